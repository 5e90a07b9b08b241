"""What programs hand over, read by transformers 4.57 and the PEFT of its time: the same tokens and the same logits as here."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from older import Older, agree, tokens
from pico import tokenizer
from program_tools import make_request, run_program
from sft_tools import request_for
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tasks.models.loading import save_tokenizer
from tasks.models.older_readers import make_tokenizer_readable, readable_config
from tuneline.workspace.protocol import Input

ROPE = {
    "rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Input:
    """As transformers 5 writes one: theta stands in `rope_parameters` alone, the tokenizer is of a class that others do not know. It begins
    every text with a token."""
    folder, words = tmp_path_factory.mktemp("base") / "model", tokenizer()
    words.extra_special_tokens = ["<|im_start|>", "<|im_end|>"]
    start = TemplateProcessing(single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", words.bos_token_id)])
    words.backend_tokenizer.post_processor = Sequence([words.backend_tokenizer.post_processor, start])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1, rope_parameters=ROPE, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return Input(path=folder, digest="b" * 64, type="Model")


@pytest.fixture(scope="module")
def full(base: Input, tmp_path_factory: pytest.TempPathFactory) -> Input:
    return trained(tmp_path_factory.mktemp("full"), base, method="full")


@pytest.fixture(scope="module")
def dora(full: Input, tmp_path_factory: pytest.TempPathFactory) -> Input:
    return trained(tmp_path_factory.mktemp("dora"), full, lora={"r": 4, "lora_alpha": 8, "use_dora": True})


def trained(folder: Path, base: Input, **fields: Any) -> Input:
    request = request_for(folder, base, max_steps=3, learning_rate=3e-3, **fields)
    result, _ = run_program(request)
    kind: dict[str, Any] = {"type": "Model"} if "method" in fields else {"type": "Adapter", "base": base}
    return Input(path=request.payload, digest="c" * 64, template=result.info["template"], **kind)


def merged(folder: Path, adapter: Input, by: str) -> Input:
    request = make_request(folder, {"kind": "merge", "adapters": ["sft"]}, {"adapters.0": adapter})
    result, _ = run_program(request)
    assert result.info["merged_by"] == by
    return Input(path=request.payload, digest="d" * 64, type="Model")


# --- artifacts --------------------------------------------------------------------------------------------------------


def test_a_model_trained_whole(older: Older, full: Input) -> None:
    agree(older, full)
    config = json.loads((full.path / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32"  # the former is what readers before 4.56 look for


@pytest.mark.slow
def test_adapters(older: Older, full: Input, dora: Input, tmp_path: Path) -> None:
    agree(older, dora)
    agree(older, trained(tmp_path, full))


@pytest.mark.slow
def test_merged_models(older: Older, dora: Input, tmp_path: Path) -> None:
    agree(older, merged(tmp_path / "streamed", dora, "streaming"))
    unusual = dora.model_copy(update={"path": tmp_path / "unusual"})
    shutil.copytree(dora.path, unusual.path)
    config = json.loads((dora.path / "adapter_config.json").read_text())
    (unusual.path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"nothing": 8}}))
    agree(older, merged(tmp_path / "by-peft", unusual, "PEFT"))


# --- tokenizers -------------------------------------------------------------------------------------------------------

BYTE_LEVEL = ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer"]
PIECES = ["LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"]


def made(name: str, prefix: bool) -> Any:
    """A small tokenizer of one of version 5's classes."""
    import transformers

    kind = getattr(transformers, name)
    if name in PIECES:
        marks = list(kind().get_vocab())
        letters = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"Whatis2+?user\n", "▁▁", "is", "▁is", "us", "er", "user"]
        vocab = {token: number for number, token in enumerate(dict.fromkeys(marks + letters))}
        return kind(vocab=vocab, merges=[("▁", "▁"), ("i", "s"), ("▁", "is"), ("u", "s"), ("e", "r"), ("us", "er")])
    model = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    marks = [token for token in kind().get_vocab() if token not in model["vocab"]]
    vocab = model["vocab"] | {token: len(model["vocab"]) + number for number, token in enumerate(marks)}
    return kind(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], add_prefix_space=prefix)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("name", [*BYTE_LEVEL, *PIECES])
def test_tokenizers_of_other_classes(older: Older, tmp_path: Path, name: str, prefix: bool) -> None:
    words = made(name, prefix)
    words.chat_template = TEMPLATE
    words.extra_special_tokens = ["<|one|>"]
    words.pad_token = words.pad_token or words.eos_token
    save_tokenizer(words, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokens(again) == older.ask("read_tokenizer", tmp_path) == tokens(words)
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    make_tokenizer_readable(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_bytes() == before


# --- configurations ---------------------------------------------------------------------------------------------------

SPECIAL = [
    "cohere2", "gemma3_text", "gpt_neox", "gpt_oss", "granitemoehybrid", "llama", "mamba2", "modernbert-decoder", "olmo3", "phi", "phi3", "qwen3_moe",
    "zamba2",
]  # fmt: skip
SKIPPED = {"transformers_version", "torch_dtype", "dtype", "_name_or_path"}  # of the version that reads
# (model type, key): why 4.57 reads another value than before.
KNOWN = {
    ("bamba", "partial_rotary_factor"): "version 5 takes the half, whatever stands there",
    ("dbrx", "refused"): "it has parts that 4.57 takes with no further key",
    ("falcon_mamba", "use_falcon_mambapy"): "has another name in version 5, and changes no result",
    ("fuyu", "use_cache"): "is a part's in version 5, and changes no result",
    ("granitemoehybrid", "layer_types"): "nothing is a list of mamba",
    ("longcat_flash", "num_hidden_layers"): "is twice num_layers, whatever stands there",
    **dict.fromkeys([("xlm", f"{name}_index") for name in ("bos", "eos", "pad")], "is the token's id, whatever stands there"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [SPECIAL, pytest.param(None, marks=pytest.mark.full)], ids=["special", "all"])
def test_configurations_of_other_models(older: Older, kinds: list[str] | None) -> None:
    """What 4.57 has written, and version 5 has read and written again, says the same to both."""
    tried, written, ours = [], [], []
    for kind, changed, config in older.ask("variants", kinds):
        try:
            read = CONFIG_MAPPING[kind].from_dict(deepcopy(config))
        except Exception:  # of any type: version 5 knows no such model, or takes no such value
            continue
        if changed == "defaults":
            assert readable_config(config) == config  # what others read already stays as it is
        tried.append((kind, changed, config, read.to_dict()))
        written.append(json.loads(read.to_json_string()))
        ours.append(readable_config(written[-1]))
        if ours[-1].get("rope_parameters"):  # version 5 reads the same, or they would not be there
            assert "rope_scaling" in ours[-1]
    before, after, without = (older.ask("read_configs", configs) for configs in ([config for _, _, config, _ in tried], ours, written))
    lost = {place: changed for place, changed in differences(tried, before, after).items() if place not in KNOWN}
    assert not lost
    assert {("llama", "rope_theta"), ("gpt_neox", "rotary_pct"), ("qwen3_moe", "num_experts")} <= differences(tried, before, without).keys()


def differences(tried: list[Any], before: list[Any], after: list[Any]) -> dict[tuple[str, str], list[str]]:
    """(model type, key): what was changed where 4.57 reads another value than before, but where version 5 itself does."""
    found = defaultdict(list)
    for (kind, changed, _, read), one, other in zip(tried, before, after, strict=True):
        for name in unequal(one, other, read) if "refused" not in other else ["refused"]:
            found[kind, name].append(changed)
    return found


def unequal(before: Any, after: Any, read: Any) -> list[str]:
    found = []
    for name in before.keys() - SKIPPED:
        one, other, ours = before[name], after.get(name), read.get(name)
        if isinstance(one, dict) and isinstance(other, dict) and "model_type" in one:
            found += unequal(one, other, ours)
        elif one != other and (ours == one or ours != other):
            found.append(name)
    return found
