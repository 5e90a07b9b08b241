"""What our programs make of each architecture: the table in docs/architectures.md.

`python tests/support/architecture_table.py [TYPE...]` writes what the runtime that it runs under has programs for: under `torch` all but
`gptq`, under `quantize` that column alone. What it does not try stays in the document as it was.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pico import tokenizer
from program_tools import make_request, run_program

from tasks.data.rows import SPLITS, Row, write_rows
from tasks.models.loading import template_hash
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Input, Request

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
BEGIN, NOTES = "<!-- tests/support/architecture_table.py -->\n", "\nRefused, and what to set:\n\n"
QUANTIZES = importlib.util.find_spec("gptqmodel") is not None
COLUMNS = ("lora", "dora", "full", "packing", "merge", "evaluate", "gptq")
HERE = COLUMNS[-1:] if QUANTIZES else COLUMNS[:-1]

COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
GATED = {"intermediate_size": 128, "num_key_value_heads": 2}
HEADS = {**GATED, "head_dim": 16}
SHARED = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **GATED, "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

TYPES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": {**HEADS, "query_pre_attn_scalar": 16},
    "gemma3_text": {**HEADS, "query_pre_attn_scalar": 16},
    "phi": {**GATED, "num_key_value_heads": 4},
    "phi3": GATED,
    "smollm3": GATED,
    "granite": GATED,
    "olmo2": GATED,
    "cohere": GATED,
    "cohere2": HEADS,
    "glm4": HEADS,
    "starcoder2": GATED,
    "stablelm": GATED,
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 128},
    "gptj": {"rotary_dim": 8},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {},
    "falcon": {},
    "mpt": {},
    "mixtral": {**GATED, **LOCAL},
    "qwen2_moe": {**GATED, **SHARED},
    "qwen3_moe": {**HEADS, **SHARED},
    "qwen3_next": {
        **HEADS, **SHARED, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": {**DEEPSEEK, "num_key_value_heads": 2, "head_dim": 16},
    "olmoe": {**GATED, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**GATED, **LOCAL},
    "gpt_oss": {**HEADS, **LOCAL},
    "mamba": {"state_size": 8},
    "olmo": GATED,
    "olmo3": HEADS,
    "seed_oss": HEADS,
    "exaone4": HEADS,
    "ernie4_5": HEADS,
    "hunyuan_v1_dense": HEADS,
    "nemotron": GATED,
    "gemma4_text": HEADS,
    "vaultgemma": HEADS,
    "helium": HEADS,
    "arcee": HEADS,
    "apertus": HEADS,
    "bitnet": GATED,
    "diffllama": GATED,
    "doge": HEADS,
    "persimmon": {**GATED, "num_key_value_heads": 4},
    "codegen": {"rotary_dim": 8, "n_ctx": 512},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": 128},
    "gpt_bigcode": {},
    "gpt_neox_japanese": {},
    "biogpt": {"intermediate_size": 128},
    "xglm": {"ffn_dim": 128, "attention_heads": 4, "num_layers": 2, "d_model": 64},
    "ctrl": {"n_positions": 512, "dff": 128},
    "openai-gpt": {},
    "phimoe": {**GATED, **LOCAL},
    "ernie4_5_moe": {**HEADS, "moe_intermediate_size": 64, "moe_num_experts": 4, "moe_k": 2},
    "granitemoeshared": {**GATED, **LOCAL, "shared_intermediate_size": 64},
    "dots1": DEEPSEEK,
    "minimax": {**HEADS, **LOCAL},
    "jamba": {
        **GATED, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False,
    },
    "bamba": {**GATED, **SSM, "attn_layer_indices": [1]},
    "falcon_h1": {**HEADS, **SSM, "mamba_d_ssm": 128},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2},
    "lfm2": {**GATED, "full_attn_idxs": [1]},
    "recurrent_gemma": {**HEADS, "lru_width": 64, "num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 64, "context_length": 512},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
}  # fmt: skip
"""By model type: where its pico model differs from `COMMON`."""
UNPREFIXED = ("gpt2", "bloom")  # as they are published: their names lack the model's prefix


def save(folder: Path, model_type: str, **fields: Any) -> Input:
    """A random pico model of the type, with the tests' tokenizer."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tokenizer()
    torch.manual_seed(0)
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = AutoConfig.for_model(model_type, vocab_size=len(words), **{**COMMON, **special, **TYPES.get(model_type, {}), **fields})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # a router of zeros would give every token to the same experts
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    if model_type in UNPREFIXED:
        file = folder / "model.safetensors"
        save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    words.save_pretrained(folder)
    return Input(path=folder, digest="b" * 64, type="Model", template=template_hash(words))


def save_rows(folder: Path) -> Input:
    folder.mkdir()
    for start, split in zip((0, 20, 26), SPLITS, strict=True):
        rows = [
            Row(
                source="s",
                messages=(
                    {"role": "user", "content": f"{i} + {i % 7}?"},
                    {"role": "assistant", "content": f"It is {i + i % 7}, of course."},
                ),
                id=f"row{i}",
                group=str(i),
            )
            for i in range(start, start + (20 if split == "train" else 6))
        ]
        write_rows(rows, folder / f"{split}.parquet")
    return Input(path=folder, digest="d" * 64, type="Dataset")


class Trial:
    """One architecture through the programs."""

    def __init__(self, folder: Path, model_type: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.model_type, self.folder, self.data = model_type, folder, save_rows(folder / "data")
        self.base = save(folder / "base", model_type)
        self.done: dict[str, Request] = {}

    def cell(self, column: str) -> str:
        """Return `yes`, or why it is refused before anything is computed. Anything else begins with FAILS."""
        before = {"merge": "lora", "evaluate": "lora"}.get(column)
        if before is not None and before not in self.done:
            return f"nothing to {column}"
        request = self.request(column)
        try:
            run_program(request)
        except StageFailed as error:
            file = request.work / "events.jsonl"
            events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            if error.failure_class in ("config", "data") and error.hint and not any(event["type"] == "progress" for event in events):
                return self.said(f"{error.message}: {error.hint}")
            return f"FAILS late, {error.failure_class}: {error.message}; {error.hint}"
        except Exception as error:
            return f"FAILS {type(error).__name__}: {str(error).strip()[:300]}"
        self.done[column] = request
        return "yes"

    def said(self, text: str) -> str:
        """The text without the type's name and the first of its blocks, so that types share their notes."""
        return re.sub(r"[\w.]+\.\d+\.(?=[a-z])", "", text).replace(f"`{self.model_type}`", "this type").replace("|", "/")

    def request(self, column: str) -> Request:
        sft: dict[str, Any] = {
            "kind": "sft",
            "model": "base",
            "dataset": "data",
            "max_steps": 2,
            "global_batch_size": 4,
            "learning_rate": 1e-2,
        }
        lora = {"r": 4, "lora_alpha": 8}
        configs: dict[str, dict[str, Any]] = {
            "lora": {**sft, "lora": lora},
            "dora": {**sft, "lora": {**lora, "use_dora": True}},
            "full": {**sft, "method": "full"},
            "packing": {**sft, "lora": lora, "packing": True, "max_length": 256},
            "merge": {"kind": "merge", "adapters": ["sft"]},
            "evaluate": {"kind": "evaluate", "model": "sft", "datasets": ["data"], "max_new_tokens": 4},
            "gptq": {"kind": "quantize", "model": "base", "calibration": "data", "samples": 8, "group_size": 32},
        }
        inputs = {
            "merge": lambda: {"adapters.0": self.adapter()},
            "evaluate": lambda: {"model": self.adapter(), "datasets.0": self.data},
            "gptq": lambda: {"model": self.base, "calibration": self.data},
        }.get(column, lambda: {"model": self.base, "dataset": self.data})()
        return make_request(self.folder / column, configs[column], inputs)

    def adapter(self) -> Input:
        path = self.done["lora"].payload
        return Input(path=path, digest="a" * 64, type="Adapter", template=self.base.template, base=self.base)


# --- the document -----------------------------------------------------------------------------------------------------


Table = dict[str, dict[str, str]]


def read() -> Table:
    """The document's table, notes in the place of their numbers."""
    text, _, notes = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(NOTES)
    said = dict(re.findall(r"^(\d+)\. (.+)$", notes, re.MULTILINE))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:] if line]
    return {row[0].strip("`"): dict(zip(COLUMNS, (said.get(cell.strip("[]"), cell) for cell in row[1:]), strict=True)) for row in rows}


def written(table: Table) -> str:
    notes = list(dict.fromkeys(cell for row in table.values() for cell in row.values() if len(cell) > len("untried")))
    lines = [f"| type | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, row in table.items():
        cells = (f"[{notes.index(row[column]) + 1}]" if row[column] in notes else row[column] for column in COLUMNS)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + NOTES + "".join(f"{number}. {note}\n" for number, note in enumerate(notes, 1))


def tried(folder: Path, types: Iterable[str], columns: Iterable[str] = HERE) -> Table:
    found: Table = {}
    for name in types:
        trial = Trial(folder / name, name)
        found[name] = {column: trial.cell(column) for column in columns}
    return found


def main(types: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        known = read()
        table = {name: known.get(name) or dict.fromkeys(COLUMNS, "untried") for name in TYPES}
        for name in types or TYPES:
            table[name] |= tried(Path(folder), [name])[name]
            print(name, table[name], flush=True)
    head, _, _ = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(head + BEGIN + written(table), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
