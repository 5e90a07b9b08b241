"""Strategies of sharing a training, over two gloo ranks on pico models: the same result, and each survives what kills it."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_tools import finish, kill_at, losses, start_until, state, steps
from processes import PATIENCE, until
from program_tools import payload_digest, run_program
from sft_tools import TURNING, furthest, request_for
from strategy_tools import FIELDS, TOLERANCE, failure, with_resources

from tasks.training import checkpoints, deepspeed_checkpoints, sft, strategies
from tuneline.errors import StageFailed
from tuneline.kinds.sft import SftStage
from tuneline.kinds.stage import Resources
from tuneline.workspace.checkpoints import layout
from tuneline.workspace.protocol import Events, Input, Request

NOISE = (
    "FutureWarning",
    "Failed to load",
    "Setting accelerator",
    "GPT-QModel",
    "GIL is enabled",
    "Enum subclass",
    "Loading weights",
    "INFO",
)


DECAYING: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "weight_decay": 10.0}


@pytest.fixture
def patched(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if strategy == "fsdp":
        monkeypatch.setenv("PATCHES", "fsdp_on_cpus")


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, base: Input) -> Callable[[str], Request]:
    """Trained by two real processes, by strategy."""

    @functools.cache
    def whole(strategy: str) -> Request:
        request = request_for(tmp_path_factory.mktemp(strategy) / "whole", base, **fields_of(strategy))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions(request)))
            finish(request, 2, real=True)
        return request

    return whole


def extensions(request: Request) -> Path:
    """Where torch would put what it compiles."""
    return request.work.parent / "extensions"


def fields_of(strategy: str) -> dict[str, Any]:
    return FIELDS | {"resources": {"processes": 2, "strategy": strategy, "checkpoint_steps": 4}}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_two_processes_train_the_adapter_of_one(one: Request, wholes: Callable[[str], Request], strategy: str) -> None:
    whole = wholes(strategy)
    log = (whole.work / "log.txt").read_text() + (whole.work / "ranks" / "1.log").read_text()
    assert f"{strategy} trains, over 2 processes" in log
    assert "micro-batches: flattened, attention by_rows" in log
    assert not [line for line in log.splitlines() if any(noise in line for noise in NOISE)]
    assert steps(whole) == list(range(1, 17))
    for of in ("loss", "eval_loss"):
        assert losses(whole, of) == pytest.approx(losses(one, of), rel=TOLERANCE)
    assert furthest(one, whole) < 1e-3
    assert not extensions(whole).exists()  # nothing was compiled


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("zero1", marks=pytest.mark.full), pytest.param("zero2", marks=pytest.mark.full), "zero3", "fsdp"]
)
def test_killed_a_rank_ends_the_training_which_goes_on(
    tmp_path: Path, base: Input, wholes: Callable[[str], Request], strategy: str
) -> None:
    killed = request_for(tmp_path / "killed", base, **fields_of(strategy))
    process, ranks = start_until(killed, 6, 2)
    os.kill(ranks[1], signal.SIGKILL)
    until(lambda: not state(ranks[1]))  # the launcher hears of it before the other one can fail for want of it
    os.kill(ranks[0], signal.SIGCONT)
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGKILL, (killed.work / "log.txt").read_text()
    said = failure(killed)
    assert (said.failure_class, said.message) == ("transient", "process 1 was ended by SIGKILL")
    assert "Traceback" not in said.details  # not what the others made of it
    before = len(steps(killed))
    finish(killed, 2)
    assert steps(killed)[before] == 5
    assert payload_digest(killed) == payload_digest(wholes(strategy))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "before", "after"),
    [
        ({}, ("zero2", 2), ("zero1", 4)),
        pytest.param(DECAYING, ("zero1", 2), ("zero2", 1), marks=pytest.mark.full),
        (DECAYING, ("zero3", 2), ("zero3", 1)),
        pytest.param({}, ("zero3", 1), ("zero3", 2), marks=pytest.mark.full),
    ],
    ids=["zero2-to-zero1-over-more", "full-zero1-to-zero2-over-fewer", "full-zero3-over-fewer", "zero3-over-more"],
)
def test_a_split_checkpoint_is_read_by_another_number_of_processes(
    tmp_path: Path,
    base: Input,
    fields: dict[str, Any],
    before: tuple[str, int],
    after: tuple[str, int],
) -> None:
    """The curve is that of one process throughout; the norms of a full training are in a group of their own, which does not decay."""
    (strategy, processes), (then, more) = before, after
    fields = FIELDS | fields
    whole = request_for(tmp_path / "one", base, **fields)
    run_program(whole)
    resources = {"strategy": strategy, "processes": processes, "checkpoint_steps": 4}
    killed = request_for(tmp_path / "killed", base, **fields, resources=resources)
    kill_at(killed, 6, 2)  # by the launcher, which DeepSpeed needs
    left = killed.work / deepspeed_checkpoints.FOLDER
    left.mkdir()
    (left / "latest_universal").write_text("half of one, of an earlier attempt")
    known = len(steps(killed))
    finish(with_resources(killed, strategy=then, processes=more), 2)
    written, wanted = (checkpoint_layout(*each) for each in (before, after))
    assert f" has the layout {written}: it is converted to {wanted}" in (killed.work / "log.txt").read_text()
    assert steps(killed)[known] == 5
    for of in ("loss", "eval_loss"):
        assert losses(killed, of) == pytest.approx(losses(whole, of), rel=TOLERANCE)
    assert not left.exists()


def checkpoint_layout(strategy: str, processes: int) -> str:
    return layout(Resources.model_validate({"strategy": strategy, "processes": processes}))


@pytest.mark.slow
def test_the_best_adapter_may_be_of_another_number_of_processes(tmp_path: Path, base: Input) -> None:
    """Early stopping hands over a checkpoint that two processes wrote to the one that goes on."""
    whole = request_for(tmp_path / "whole", base, **TURNING)
    expected, _ = run_program(whole)
    best, resources = int(expected.metrics["best_step"]), {"processes": 2, "strategy": "zero2"}
    killed = request_for(tmp_path / "killed", base, **TURNING, resources=resources)
    kill_at(killed, best + 3, 2)
    metrics = finish(with_resources(killed, processes=1), 2)
    assert (killed.work / "log.txt").read_text().count("it is converted to zero2 over 1 process") == 2
    assert {name: metrics[name] for name in ("best_step", "steps")} == {name: expected.metrics[name] for name in ("best_step", "steps")}
    assert furthest(whole, killed) < 1e-3


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_is_not_thrown_away(tmp_path: Path, base: Input) -> None:
    """Reading it anyway would end in a long traceback, or worse."""
    fields = {"resources": {"processes": 1, "strategy": "zero2", "checkpoint_steps": 2}}
    request = request_for(tmp_path, base, **fields)
    kill_at(request, 3, 2)
    for changed, wanted in ({"strategy": "zero3"}, "zero3 over 1 process"), ({"strategy": "ddp"}, "ddp"):
        resources = Resources.model_validate({**request.resources, **changed})
        other = request.model_copy(update={"resources": resources.model_dump(mode="json")})
        arguments = sft.trainer_arguments(request_for(tmp_path / wanted, base), SftStage.model_validate(request.config | {"resources": {}}))
        arguments.output_dir = str(request.work / "checkpoints")
        with pytest.raises(
            StageFailed, match=f"checkpoint-2 was written with the strategy zero2 over 1 process, which {wanted} cannot read"
        ) as caught:
            checkpoints.newest_checkpoint(arguments, other, resources, Events(request.work / "events.jsonl"))
        assert caught.value.failure_class == "config"
        assert "--force" in caught.value.hint
    assert (request.work / "checkpoints" / "checkpoint-2").exists()


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_training(tmp_path: Path, base: Input) -> None:
    resources = {"processes": 2, "collective_timeout": 10}
    request = request_for(tmp_path, base, max_steps=5000, resources=resources)
    process, ranks = start_until(request, 2, 2)
    os.kill(ranks[1], signal.SIGSTOP)
    os.kill(ranks[0], signal.SIGCONT)
    assert process.wait(timeout=PATIENCE) == 1
    said = failure(request)
    assert said.failure_class == "transient"
    assert said.message == "process 0: another process did not answer"
    assert "Traceback" in said.details
    assert "another process of the stage ended or hangs" in said.hint


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_sigterm_has_one_more_checkpoint_written(tmp_path: Path, base: Input, processes: int) -> None:
    """As of a spot instance that is taken away; the next attempt begins with the very next step."""
    fields = {"max_steps": 12, "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}, "resources": {"processes": processes}}
    whole, ended = (request_for(tmp_path / name, base, **fields) for name in ("whole", "ended"))
    finish(whole, processes)
    process, ranks = start_until(ended, 5, processes)
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)
    os.kill(ranks[0], signal.SIGCONT)
    assert process.wait(timeout=PATIENCE) == 1
    (checkpoint,) = (ended.work / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert step in (5, 6)
    assert f"stopped by SIGTERM: a checkpoint of step {step} was written" in failure(ended).message
    before = len(steps(ended))
    finish(ended, processes)
    assert steps(ended)[before:] == list(range(step + 1, 13))
    assert payload_digest(ended) == payload_digest(whole)


def test_checkpoints_by_minutes_and_so_many_of_them(tmp_path: Path, base: Input) -> None:
    request = request_for(tmp_path, base, max_steps=12, resources={"checkpoint_minutes": 1e-6, "checkpoints_kept": 3})
    run_program(request)
    assert {path.name for path in (request.work / "checkpoints").iterdir()} == {"checkpoint-10", "checkpoint-11", "checkpoint-12"}


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"strategy": "zero1"}, {"stage": 1}),
        ({"strategy": "zero2", "gpus": 2, "offload": "optimizer"}, {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu", "pin_memory": True}}),
        ({"strategy": "zero3", "gpus": 2, "offload": "all"}, {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}, "stage3_prefetch_bucket_size": "auto"}),
    ],
)  # fmt: skip
def test_zero_is_configured_as_deepspeed_reads_it(resources: dict[str, Any], expected: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = strategies.zero_config(Resources.model_validate(resources))
    zero = config["zero_optimization"]
    assert expected.items() <= zero.items()
    read = DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
    assert read.stage == expected["stage"]
    assert config["gradient_clipping"] == "auto"


def test_a_map_of_devices_is_asked_of_transformers(base: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    seen: dict[str, Any] = {}
    real = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return real(*args, **kwargs | {"device_map": None})

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    stage = SftStage.model_validate({"kind": "sft", "model": "b", "dataset": "d", "resources": {"gpus": 2, "strategy": "device_map"}})
    strategies.load_base(base, stage, torch.float32)
    assert seen["device_map"] == "balanced"


def test_json_of_a_marker_names_the_layout(one: Request) -> None:
    marker = json.loads(next((one.work / "checkpoints").glob("*/complete")).read_text())
    assert marker["layout"] == "replicated"
