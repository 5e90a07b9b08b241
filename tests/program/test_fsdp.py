"""FSDP, which accelerate 1.15 keeps to GPUs, for real over two gloo processes: `fsdp_on_cpus` has it used on CPUs, too. And offload,
which people use with GPUs alone. What kills a training is in program/test_strategies.py, for FSDP as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from process_tools import finish, kill_at, losses, start, steps
from processes import PATIENCE
from program_tools import emulates_bfloat16, run_program
from sft_tools import TURNING, furthest, request_for
from strategy_tools import FIELDS, TOLERANCE, failure, with_resources

from tasks.training import sft, strategies
from tuneline.kinds.sft import SftStage
from tuneline.kinds.stage import Resources
from tuneline.workspace.protocol import Input, Request


@pytest.fixture
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHES", "fsdp_on_cpus")


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpus")
@pytest.mark.parametrize(
    "resources",
    [
        {"strategy": "fsdp", "gradient_checkpointing": True, "offload": "all"},
        {"strategy": "fsdp", "sequence_parallel_size": 2},
        pytest.param({"strategy": "zero2", "offload": "optimizer"}, marks=pytest.mark.full),
        pytest.param({"strategy": "zero3", "offload": "all"}, marks=pytest.mark.full),
    ],
    ids=["fsdp-checkpointing-offload", "fsdp-sequences", "zero2-offload", "zero3-offload"],
)
def test_two_processes_train_the_adapter_of_one(tmp_path: Path, base: Input, one: Request, resources: dict[str, Any]) -> None:
    two = request_for(tmp_path / "two", base, **FIELDS, resources={"processes": 2, "checkpoint_steps": 4, **resources})
    finish(two, 2)
    assert f"{resources['strategy']} trains, over 2 processes" in (two.work / "log.txt").read_text()
    for of in ("loss", "eval_loss"):
        assert losses(two, of) == pytest.approx(losses(one, of), rel=TOLERANCE)
    assert furthest(one, two) < 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpus")
@pytest.mark.skipif(emulates_bfloat16(), reason="this CPU only emulates bfloat16")
def test_in_bfloat16_it_trains_what_ddp_does(tmp_path: Path, base: Input) -> None:
    """With accelerate's own policy losses came rounded to bfloat16, off by 3e-3, and gradients were summed in it, also over the
    micro-batches, between which each process held all of them."""
    fields = FIELDS | {"dtype": "bfloat16"}
    alone = request_for(tmp_path / "alone", base, **fields)
    ddp, fsdp = (
        request_for(tmp_path / strategy, base, **fields, resources={"processes": 2, "strategy": strategy, "micro_batch_size": 1})
        for strategy in ("ddp", "fsdp")
    )
    run_program(alone)
    for request in (ddp, fsdp):
        finish(request, 2)
    assert "fsdp trains, over 2 processes" in (fsdp.work / "log.txt").read_text()
    for of in ("loss", "eval_loss"):
        assert losses(fsdp, of) == pytest.approx(losses(ddp, of), rel=2e-4)  # with gradients summed in bfloat16: 5e-4
        assert losses(fsdp, of) == pytest.approx(losses(alone, of), rel=1e-3)
    assert furthest(ddp, fsdp) < 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpus")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_is_read_by_another_number_of_processes(tmp_path: Path, base: Input, one: Request, before: int, after: int) -> None:
    killed = request_for(tmp_path / "killed", base, **FIELDS, resources={"processes": before, "strategy": "fsdp", "checkpoint_steps": 4})
    kill_at(killed, 6, 2)  # by the launcher, also one process alone
    known = len(steps(killed))
    finish(with_resources(killed, processes=after), 2)
    assert steps(killed)[known] == 5
    for of in ("loss", "eval_loss"):
        assert losses(killed, of) == pytest.approx(losses(one, of), rel=TOLERANCE)
    assert furthest(one, killed) < 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpus")
def test_the_best_weights_may_be_those_of_the_last_step(tmp_path: Path, base: Input) -> None:
    """Which every process must know, to read its part of the same checkpoint."""
    fields = TURNING | {"method": "full", "learning_rate": 1e-3, "max_steps": 12}
    whole = request_for(tmp_path / "one", base, **fields)
    expected, _ = run_program(whole)
    assert expected.metrics["best_step"] == 12
    two = request_for(tmp_path / "two", base, **fields, resources={"processes": 2, "strategy": "fsdp", "gradient_checkpointing": True})
    assert finish(two, 2) == pytest.approx(expected.metrics, rel=1e-3)


def test_fsdp_on_a_cpu_is_found_out(tmp_path: Path, base: Input) -> None:
    """`validate` refuses it; if it came through nevertheless, accelerate would train plain DDP."""
    request = request_for(tmp_path, base, resources={"processes": 2, "strategy": "fsdp"})
    assert start(request, 2).wait(timeout=PATIENCE) == 1
    said = failure(request)
    assert said.failure_class == "bug"
    assert "resources.strategy: found ddp, expected fsdp" in said.message


def test_fsdp_is_configured_by_decoder_layer(tmp_path: Path, base: Input) -> None:
    resources = Resources.model_validate({"gpus": 2, "strategy": "fsdp", "offload": "all", "gradient_checkpointing": True})
    stage = SftStage.model_validate(
        {"kind": "sft", "model": "base", "dataset": "data", "dtype": "float32", "resources": resources.model_dump()}
    )
    arguments = sft.trainer_arguments(request_for(tmp_path, base), stage)
    plugin = arguments.fsdp_plugin_args
    assert (plugin["fsdp_version"], plugin["auto_wrap_policy"], plugin["state_dict_type"]) == (
        2,
        "TRANSFORMER_BASED_WRAP",
        "SHARDED_STATE_DICT",
    )
    assert (plugin["reshard_after_forward"], plugin["cpu_offload"], plugin["activation_checkpointing"]) == (True, True, True)
    assert not arguments.activation_checkpointing  # FSDP's own, not both
    from accelerate.utils import FullyShardedDataParallelPlugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        made = FullyShardedDataParallelPlugin(**plugin)
    assert (made.fsdp_version, str(made.state_dict_type)) == (2, "StateDictType.SHARDED_STATE_DICT")


def test_gloo_is_there_for_what_fsdp_keeps_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL has nothing for tensors of the CPU, whose norms are summed over the processes."""
    from accelerate import PartialState

    asked: list[str] = []

    def init_process_group(backend: str, **_: Any) -> None:
        asked.append(backend)
        raise InterruptedError

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "", "FSDP_OFFLOAD_PARAMS": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    for offload in (None, "all"):
        monkeypatch.setattr(PartialState, "_shared_state", {})
        strategies.join_processes(Resources.model_validate({"gpus": 2, "strategy": "fsdp", "offload": offload}))
        with pytest.raises(InterruptedError):
            PartialState()
    assert asked == ["nccl", "cuda:nccl,cpu:gloo"]
