"""Micro-batches without padding: each row gets what it gets alone, and models whose rows see one another train with padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_table import COMMON, TYPES, Trial
from hypothesis import given
from hypothesis import strategies as some
from program_tools import run_program
from sft_tools import request_for
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tasks.training import rows_attention
from tasks.training.batches import balanced
from tuneline.workspace.protocol import Input

ROWS = [{"input_ids": [(7 * i + row) % 50 + 5 for i in range(length)]} for row, length in enumerate((21, 3, 13))]


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("qwen2_moe", {}),
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
        (
            "llama4_text",
            {"attention_chunk_size": 8, "num_local_experts": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size_mlp": 128},
        ),
    ],
)
def test_a_row_gets_the_states_and_gradients_that_it_gets_alone(model_type: str, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=64, **{**COMMON, **TYPES.get(model_type, {}), **fields})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    embeddings = model.get_input_embeddings().weight

    def computed(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states[-1][0]
        return states.detach(), torch.autograd.grad(states.square().sum(), embeddings)[0]

    alone = [computed({"input_ids": torch.tensor([row["input_ids"]])}) for row in ROWS]
    rows_attention.register()
    model.set_attn_implementation(rows_attention.BY_ROWS)
    flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(ROWS)
    del flat["labels"]
    states, gradients = computed(flat)
    torch.testing.assert_close(states, torch.cat([each for each, _ in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, sum(each for _, each in alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("mamba", "padded: found attention by eager"),
        pytest.param("recurrent_gemma", "padded: found", marks=pytest.mark.full),
        pytest.param("gpt_oss", "padded: found attention by eager", marks=pytest.mark.full),
        pytest.param("bamba", "padded: ", marks=pytest.mark.full),
        pytest.param("qwen3_moe", "flattened", marks=pytest.mark.full),
    ],
)
def test_what_reaches_over_the_border_is_padded(tmp_path: Path, model_type: str, found: str) -> None:
    result, _ = run_program(Trial(tmp_path, model_type).request("lora"))
    assert result.info["micro_batches"].startswith(found)


def attend_to_all(*given: Any, **named: Any) -> Any:
    of_rows = {"cu_seq_lens_q", *rows_attention.OF_ROWS}
    return sdpa_attention_forward(*given, **{name: each for name, each in named.items() if name not in of_rows})


def test_attention_that_ignores_the_border_is_found_out(tmp_path: Path, base: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for name in ("flattened, attention by_rows", "padded: found a base model whose flattened rows attend to one another"):
        if name.startswith("padded"):
            monkeypatch.setattr(rows_attention, "attend_by_rows", attend_to_all)
        result, events = run_program(request_for(tmp_path / name[:4], base, max_steps=2))
        assert result.info["micro_batches"] == name
        losses.append([event["value"] for event in events if event.get("name") == "loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@given(some.lists(some.integers(1, 90), min_size=1, max_size=40), some.integers(1, 6))
def test_micro_batches_hold_each_row_once_and_about_as_many_tokens(of_rows: list[int], size: int) -> None:
    drawn = balanced(range(len(of_rows)), of_rows, size)
    assert sorted(drawn) == list(range(len(of_rows)))
    batches = [drawn[start : start + size] for start in range(0, len(drawn), size)]
    full = [sum(of_rows[row] for row in batch) for batch in batches if len(batch) == size]
    assert not full or max(full) <= size * -(-sum(of_rows) // len(batches)) + max(of_rows)


def test_rows_are_spread_evenly() -> None:
    drawn = balanced(range(8), [24, 120, 60, 40, 100, 30, 80, 50], 4)
    assert [sum([24, 120, 60, 40, 100, 30, 80, 50][row] for row in drawn[start : start + 4]) for start in (0, 4)] == [254, 250]


def test_trl_computes_the_head_by_the_tiles_that_are_set(base: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notices a TRL that no longer reads the width that training.score_only_trained_tokens sets."""
    from trl.trainer import utils

    widths = []
    real = utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", lambda *given: widths.append(given[5]) or real(*given))
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    utils.add_fused_lm_head(model)
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert widths == [64]
