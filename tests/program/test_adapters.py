"""Every kind of adapter and of first weights: trained, resumed, read by PEFT on the untouched base, merged."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_variants import LORA, VARIANTS
from peft import PeftModel
from pico import save_pico
from process_tools import finish, losses
from program_tools import make_request, payload_digest, run_program, run_until
from sft_tools import furthest, request_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.convert.export import write_adapter
from tasks.convert.usage import usage
from tasks.training import answers
from tuneline.errors import StageFailed
from tuneline.kinds.export import ExportStage
from tuneline.workspace.protocol import Events, Input

IN_CI = {"pissa", "tokens"}
CASES = [pytest.param(name, marks=() if name in IN_CI else pytest.mark.full) for name in VARIANTS]
IDS = torch.arange(5, 60)[None]


@pytest.mark.parametrize("name", CASES)
def test_a_variant_is_trained_resumed_read_by_peft_and_merged(
    name: str, base: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "untied" in name:
        base = Input(path=save_pico(tmp_path / "untied", tied=False), digest="b" * 64, type="Model")
    trained: list[torch.Tensor] = []
    monkeypatch.setattr(answers, "trained_weights", keeping_logits(answers.trained_weights, trained))
    whole, killed = (
        request_for(tmp_path / each, base, **VARIANTS[name], resources={"checkpoint_steps": 2}) for each in ("whole", "killed")
    )
    run_program(whole)
    run_until(killed, 1)  # before a checkpoint
    run_until(killed, 5)
    run_program(killed)
    assert payload_digest(killed) == payload_digest(whole)
    assert min(losses(whole).values()) < losses(whole)[1]

    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base.path)
        if "add_tokens" in VARIANTS[name]:
            plain.resize_token_embeddings(len(AutoTokenizer.from_pretrained(whole.payload)))
        before = plain(IDS).logits
        after = PeftModel.from_pretrained(plain, whole.payload)(IDS).logits
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, trained[0], atol=1e-4, rtol=1e-4)

    adapter = Input(path=whole.payload, digest="a" * 64, type="Adapter", base=base)
    request = make_request(tmp_path / "merge", {"kind": "merge", "adapters": ["sft"]}, {"adapters.0": adapter})
    run_program(request)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(request.payload)(IDS).logits
    torch.testing.assert_close(merged, after, atol=1e-4, rtol=1e-4)

    stage, exported, loaded = ExportStage(kind="export", of="sft"), tmp_path / "exported", dict[str, Any]()
    exported.mkdir()
    code = usage(stage, write_adapter(adapter, None, stage, exported, Events(tmp_path / "events.jsonl")), False)
    assert ("resize_token_embeddings" in code) == ("add_tokens" in VARIANTS[name])
    monkeypatch.chdir(exported)
    exec(code.split("```")[1].removeprefix("python"), loaded)  # as its model card says
    with torch.no_grad():
        torch.testing.assert_close(loaded["model"](IDS).logits, after, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("pissa", "ddp"), ("olora", "zero2"), ("eva", "ddp"), ("tokens", "zero2"), ("modules", "ddp"), ("lora+", "zero3"), ("vera", "zero2"),
        ("oft", "ddp"), ("ia3", "zero1"),
    ],
)  # fmt: skip
def test_two_processes_train_the_same(name: str, strategy: str, base: Input, tmp_path: Path) -> None:
    fields = {key: {field: value for field, value in given.items() if "dropout" not in field} if isinstance(given, dict) else given
              for key, given in VARIANTS[name].items()}  # fmt: skip
    one, two = (request_for(tmp_path / each, base, **fields, resources=resources)
                for each, resources in (("one", {}), ("two", {"processes": 2, "strategy": strategy})))  # fmt: skip
    run_program(one)
    finish(two, 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert furthest(one, two) < 2e-3


@pytest.mark.full
def test_an_adapter_of_a_changed_base_is_trained_further_at_its_saved_rank(base: Input, tmp_path: Path) -> None:
    first = request_for(tmp_path / "first", base, **VARIANTS["pissa"])
    run_program(first)
    adapter = Input(path=first.payload, digest="a" * 64, type="Adapter", base=base)
    for name, lora in (("same", LORA), ("saved", {"r": 8, "lora_alpha": 16})):
        more = request_for(tmp_path / name, base, adapter="first", inputs={"adapter": adapter}, lora=lora)
        with pytest.raises(StageFailed, match="found r 8 instead of 4") if name == "same" else nullcontext():
            run_program(more)
    assert losses(more)[1] < losses(first)[1]


def keeping_logits(real: Any, kept: list[torch.Tensor]) -> Any:
    def end(trainer: Any, *args: Any) -> Any:
        found = real(trainer, *args)
        with torch.no_grad():
            kept.append(trainer.model.eval()(IDS).logits)
        return found

    return end
