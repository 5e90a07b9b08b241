"""A process with transformers 4.57 and the PEFT of its time in place of the runtime's, which reads what programs have written.

`make test-ready` makes the folder that comes first on its path; all else is the runtime's. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuneline.workspace.protocol import Input

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "older-transformers"
Document = dict[str, Any]
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class Older:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        env = {**os.environ, "PYTHONPATH": f"{FOLDER}:{ROOT}", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__], cwd=folder, env=env, stdin=pipe, stdout=pipe, stderr=log, text=True
            )

    def ask(self, what: str, *arguments: Any) -> Any:
        """Calls one of the functions below, there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([what, *arguments], default=str), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, self.log.read_text()
        answer = json.loads(line)
        assert "raised" not in answer, answer["raised"]
        return answer

    def end(self) -> None:
        self._process.communicate()


TEXTS = ["What is 2 + 2?", "<|im_start|>user\nIt's  two\twords.<|im_end|>\n", " été "]
CONVERSATION = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]


def tokens(tokenizer: Any) -> Document:
    """What a tokenizer makes of texts and of a conversation."""
    ids = tokenizer(TEXTS)["input_ids"]
    return {
        "ids": ids,
        "inputs": sorted(tokenizer(TEXTS[0])),
        "padding": tokenizer(TEXTS, padding=True)["attention_mask"],
        "texts": tokenizer.batch_decode(ids),
        "rendered": tokenizer.apply_chat_template(CONVERSATION, tokenize=False),
        "special": sorted(tokenizer.all_special_tokens),
        "named": {name: getattr(tokenizer, name) for name in NAMED},
    }


def agree(older: Older, source: Input) -> None:
    """Asserts that an artifact gives others the tokens, the texts, the end and the logits that it gives us."""
    import torch

    from tasks.models.loading import load_model, load_tokenizer

    words = load_tokenizer(source)
    assert older.ask("read_tokenizer", source.path) == tokens(words)
    prompt = words(TEXTS[1] * 12)["input_ids"]  # long enough for theta to matter
    read = older.ask("read_model", (source.base or source).path, prompt, source.path if source.base else None)
    with torch.inference_mode():
        expected = load_model(source, torch.float32)(input_ids=torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(torch.tensor(read["logits"]), expected, atol=1e-4, rtol=1e-4)
    assert read["end"] == words.eos_token_id


# --- what it is asked for ---------------------------------------------------------------------------------------------


def variants(kinds: list[str] | None) -> list[tuple[str, str, Document]]:
    """(model type, what was changed, config.json) of the causal language models that 4.57 knows: its defaults, and each value changed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = []
    for kind in kinds or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            defaults = document(CONFIG_MAPPING[kind]())
        except ValueError:  # of parts that must be given
            continue
        for name, fields in {"defaults": {}, **changes(defaults)}.items():
            try:
                found.append((kind, name, json.loads(CONFIG_MAPPING[kind](**fields).to_json_string())))
            except Exception:  # of any type: the class refuses the value
                continue
    return found


def changes(defaults: Document) -> dict[str, Document]:
    from transformers import PretrainedConfig

    found: dict[str, Document] = {}
    general = document(PretrainedConfig()).keys() - {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    for name, value in defaults.items():
        if name in general:
            continue
        if isinstance(value, bool):
            found[name] = {name: not value}
        elif isinstance(value, int):
            found[name] = {name: value + 1 if name.endswith("_id") or value < 1 else value * 2}
        elif isinstance(value, float):
            found[name] = {name: value * 1.5 or 0.25}
    if {"rope_scaling", "hidden_size", "num_attention_heads"} <= defaults.keys():
        found |= {name: {"rope_scaling": scaling, "rope_theta": 54321.0} for name, scaling in scalings(defaults).items()}
    return found


def scalings(defaults: Document) -> dict[str, Document]:
    context = defaults["max_position_embeddings"]
    width = defaults.get("head_dim") or defaults["hidden_size"] // defaults["num_attention_heads"]
    half = int(width * (defaults.get("partial_rotary_factor") or 1)) // 2
    factors = {"short_factor": [1.5] * half, "long_factor": [2.5] * half}
    return {
        "linear": {"rope_type": "linear", "factor": 4.0},
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": context // 4, "beta_fast": 16.0},
        "llama3": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": context // 8,
        },
        "longrope": {"type": "longrope", **factors} if defaults["model_type"].startswith("phi") else {"rope_type": "longrope", "factor": 4.0, **factors},
    }  # fmt: skip


def read_configs(documents: list[Document]) -> list[Document]:
    """What 4.57 makes of each config.json; `refused` where it takes none."""
    return [read_config(each) for each in documents]


def read_config(config: Document) -> Document:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return document(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    except Exception as error:  # of any type
        return {"refused": repr(error)}


def document(config: Any) -> Document:
    found: Document = json.loads(config.to_json_string(use_diff=False))
    return found


def read_tokenizer(folder: str) -> Document:
    from transformers import AutoTokenizer

    return tokens(AutoTokenizer.from_pretrained(folder))


def read_model(folder: str, ids: list[int], adapter: str | None = None) -> Document:
    """Logits of a model, or of an adapter on it, as anyone would load them; GPTQ weights are decoded by our own reader."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from tasks.models.gptq import is_gptq, load_dense

    if is_gptq(Path(folder)):
        model = load_dense(Path(folder), torch.float32)
    else:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    return {"logits": logits.tolist(), "end": GenerationConfig.from_pretrained(folder).eos_token_id}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    gc.disable()
    for name in (
        "bitsandbytes",
        "deepspeed",
        "gptqmodel",
        "optimum",
        "pandas",
        "scipy",
        "sklearn",
        "torchao",
    ):  # imported if they are there
        sys.modules[name] = None  # type: ignore[assignment]
    import peft
    import transformers

    assert transformers.__version__.startswith("4.57."), transformers.__version__
    assert str(FOLDER) in str(peft.__file__)
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            answer = globals()[what](*arguments)
        except Exception:  # of any type: the test gets the traceback
            answer = {"raised": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
