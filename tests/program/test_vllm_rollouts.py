"""grpo with vLLM: the adapter that it serves is the trainer's at every step, and where it is not the stage ends.

The trainings borrow one server for most of them: a start takes half a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_tools import SMALL, request_for
from process_tools import finish, start
from processes import until
from program_tools import run_program
from safetensors.torch import load_file, save_file
from vllm_tools import GREEDY, PROMPTS, SAMPLED, alive, borrowed_from, family_of

from tasks.engine.client import BASE, Engine
from tasks.training import grpo, rollouts
from tasks.training.rollouts import MEMORY, folder_in_memory
from tuneline.errors import StageFailed
from tuneline.kinds.adapters import Lora
from tuneline.kinds.grpo import GrpoStage
from tuneline.workspace.protocol import Input, Request

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(taught: Input) -> Input:
    return taught


@pytest.fixture
def borrowed(server: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Trainings get this server in place of one of their own."""
    monkeypatch.setattr(rollouts, "Engine", borrowed_from(server, lambda *_: None))
    return server


def with_vllm(folder: Path, base: Input, seed: int, **fields: Any) -> Request:
    return request_for(folder, base, engine=Path("python"), seed=seed, rollouts={"engine": "vllm"}, **fields)


def values(events: list[dict[str, Any]], name: str) -> list[float]:
    return [event["value"] for event in events if event.get("name") == name]


@pytest.mark.slow
def test_every_step_samples_from_the_adapter_as_it_is(tmp_path: Path, base: Input, borrowed: Engine) -> None:
    request = with_vllm(tmp_path, base, 1, max_steps=20, global_batch_size=16, num_generations=8)
    result, events = run_program(request)
    fresh, metrics = values(events, "freshness_max_logprob_diff"), result.metrics
    assert len(fresh) == 20
    assert 0 < max(fresh) == metrics["freshness_max_logprob_diff"] < 1e-3
    reward = values(events, "reward")
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.15
    assert metrics["sync_bytes"] == sum(tensor.nbytes for tensor in load_file(request.payload / "adapter_model.safetensors").values())
    assert metrics["sync_bytes"] < 0.1 * result.info["model_bytes"]
    assert borrowed._loaded == {name for name in borrowed._names if name.startswith("sync-20-step-19-")}
    assert float(result.info["noise_floor"]) < 1e-3
    assert not list(MEMORY.glob("tuneline-000000000000-*"))
    assert (request.meta / "engine.log").exists()


def plant(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[list[Weights]], Weights], sync: int) -> None:
    """From a sync on, what the engine gets is not what is trained."""
    seen: list[Weights] = []
    save = rollouts.save_adapter

    def save_another(model: Any, tensors: Weights, place: Path, source: Input, lora: Lora) -> None:
        save(model, tensors, place, source, lora)
        seen.append(load_file(place / "adapter_model.safetensors"))
        if len(seen) >= sync:
            save_file(wrong(seen), place / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(rollouts, "save_adapter", save_another)


def nothing(seen: list[Weights]) -> Weights:
    return {name: torch.zeros_like(tensor) if ".lora_B." in name else tensor for name, tensor in seen[-1].items()}


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [3e-3, 1e-5])
def test_the_adapter_of_the_step_before_is_found_out(
    tmp_path: Path, base: Input, borrowed: Engine, monkeypatch: pytest.MonkeyPatch, learning_rate: float
) -> None:
    plant(monkeypatch, lambda seen: seen[-2], 3)
    request = with_vllm(
        tmp_path, base, 2 if learning_rate == 1e-5 else 3, learning_rate=learning_rate, global_batch_size=16, num_generations=8, max_steps=8
    )
    with pytest.raises(StageFailed, match="vLLM samples from stale weights|vLLM does not sample from the trained weights") as caught:
        run_program(request)
    print(caught.value)
    assert caught.value.failure_class == "bug"
    if learning_rate == 1e-5:
        assert "stale weights: at step 2 its log-probabilities differ by" in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [3e-3, 1e-4])
def test_the_base_in_place_of_the_adapter_is_found_out(
    tmp_path: Path, base: Input, borrowed: Engine, monkeypatch: pytest.MonkeyPatch, learning_rate: float
) -> None:
    plant(monkeypatch, nothing, 1)
    request = with_vllm(
        tmp_path, base, 4 if learning_rate == 1e-4 else 5, learning_rate=learning_rate, global_batch_size=16, num_generations=8, max_steps=8
    )
    with pytest.raises(StageFailed, match="vLLM samples from stale weights|vLLM does not sample from the trained weights"):
        run_program(request)


@pytest.mark.slow
def test_another_name_in_the_reply_is_found_out(tmp_path: Path, base: Input, borrowed: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = borrowed._server.stream
    monkeypatch.setattr(borrowed._server, "stream", lambda path, body: ({**event, "model": BASE} for event in stream(path, body)))
    with pytest.raises(StageFailed, match="vLLM: found an answer of model base, expected sync-1-step-0-"):
        run_program(with_vllm(tmp_path, base, 6))


@pytest.mark.slow
@pytest.mark.process
def test_killed_in_the_middle_it_leaves_no_server_and_goes_on(tmp_path: Path, base: Input, vllm_python: Path) -> None:
    fields = {"max_steps": 6, "resources": {"checkpoint_steps": 2, "engine": {"enforce_eager": True, "cpu_memory": 0.25}}}
    request = request_for(tmp_path, base, engine=vllm_python, rollouts={"engine": "vllm"}, **fields)
    process = start(request, real=True)
    until(lambda: (request.work / "checkpoints" / "checkpoint-2" / "complete").exists() or process.poll() is not None)
    family = family_of(process.pid)
    assert len(family) >= 4  # the watchdog, the server, its core and its worker
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not alive(family))
    until(lambda: not list(MEMORY.glob("tuneline-000000000000-*")))  # the server's watchdog takes the adapter along
    metrics = finish(request)
    assert "resuming from checkpoint-" in (request.work / "log.txt").read_text()
    assert metrics["steps"] == 6
    assert metrics["freshness_max_logprob_diff"] < 1e-3
    config = json.loads((request.payload / "adapter_config.json").read_text())
    assert config["r"] == 4
    kept = [json.loads(line)["step"] for line in (request.meta / "rollouts.jsonl").read_text().splitlines()]
    assert kept == [step for step in range(1, 7) for _ in range(8)]


@pytest.mark.slow
def test_two_processes_share_one_engine(tmp_path: Path, base: Input, vllm_python: Path) -> None:
    resources = {"processes": 2, "micro_batch_size": 2, "engine": {"enforce_eager": True, "cpu_memory": 0.25}}
    request = request_for(tmp_path, base, engine=vllm_python, rollouts={"engine": "vllm"}, max_steps=3, resources=resources)
    metrics = finish(request, 2)
    assert (request.work / "log.txt").read_text().count("starting vLLM") == 1
    assert metrics["steps"] == 3
    assert metrics["freshness_max_logprob_diff"] < 1e-3
    kept = [json.loads(line) for line in (request.meta / "rollouts.jsonl").read_text().splitlines()]
    for step in range(1, 4):  # seeds differ between processes: whole groups, no completion twice for one reason
        prompts = [line["prompt"] for line in kept if line["step"] == step]
        assert {prompts.count(prompt) for prompt in prompts} == {4}


# --- without a server -------------------------------------------------------------------------------------------------


def test_an_engine_that_does_not_come_up_shows_the_end_of_its_log(tmp_path: Path, base: Input) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such device >&2\nexit 3\n")
    broken.chmod(0o755)
    request = request_for(tmp_path / "stage", base, engine=broken, rollouts={"engine": "vllm"})
    with pytest.raises(
        StageFailed, match=r"vLLM ended with status 3 before it was ready; the end of engine.log:\nno such device"
    ) as caught:
        run_program(request)
    assert caught.value.failure_class == "config"
    until(lambda: not list(MEMORY.glob("tuneline-000000000000-*")))  # those of the test before, too


def test_the_memory_of_a_living_training_is_left_alone() -> None:
    with folder_in_memory("a" * 64) as one:
        with folder_in_memory("b" * 64) as other:
            assert one.is_dir()
            assert other.is_dir()
        assert one.is_dir()
        assert not other.exists()
    assert not one.exists()


@pytest.mark.parametrize(
    ("gpus", "engine", "seen", "training", "sampling"),
    [
        (0, None, "", "", None), (1, {}, "3", "3", ["3"]), (2, {"gpus": 1}, "4,6", "4", ["6"]), (4, {"gpus": 2}, "0,1,2,3", "0,1", ["2", "3"]),
    ],
)  # fmt: skip
def test_devices_are_split(
    monkeypatch: pytest.MonkeyPatch, gpus: int, engine: dict[str, Any] | None, seen: str, training: str, sampling: list[str] | None
) -> None:
    resources = {"gpus": gpus, "engine": engine}
    stage = GrpoStage.model_validate({**SMALL, "rollouts": {"engine": "vllm"}, "resources": resources})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert grpo.split_devices(stage) == sampling
    assert os.environ["CUDA_VISIBLE_DEVICES"] == training


@pytest.fixture(autouse=True)
def room(tmp_path: Path) -> Iterator[None]:
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


# --- the last, for it kills the server --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_dies_at_work_is_a_passing_failure(server: Engine) -> None:
    assert server._server.process is not None
    family = family_of(server._server.process.pid)
    server.generate(PROMPTS, GREEDY, model=BASE)
    worker = next(process for process, name in family.items() if "Worker" in name)

    def kill(*_: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)

    with pytest.raises(StageFailed, match="engine.log:\n") as failed:
        server.generate([[5]] * 500, SAMPLED, model=BASE, done=kill)
    server.__exit__(None, None, None)
    assert failed.value.failure_class == "transient"
    assert not alive(family)
