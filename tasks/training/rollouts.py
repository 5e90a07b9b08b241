"""Gets completions from vLLM while a LoRA adapter is trained: hands over every new adapter, and checks that vLLM samples from it.

A sync writes only the adapter (not the model) into a folder in memory, loads it under a name never used before and unloads the
previous one. Then the engine's log-probabilities of its completions are compared with the trainer's, under the current weights and
under those of the previous sync. Other systems train on stale samples silently (docs/grpo.md names some).

Left out: sampling ahead while the trainer works, weights of the whole model, other engines.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, set_peft_model_state_dict

from tasks.engine.client import BASE, Adapters, Completion, Engine, Sampling
from tasks.engine.server import Place
from tasks.models.loading import compute_type
from tasks.models.targets import Targets
from tasks.training.shared import adapter_tensors, save_adapter
from tuneline.errors import StageFailed
from tuneline.files import hold_lock, try_lock
from tuneline.kinds.engine import EngineSettings
from tuneline.kinds.grpo import GrpoStage
from tuneline.workspace.file_names import ENGINE_LOG
from tuneline.workspace.protocol import Events, Request
from tuneline.workspace.reference import folder_of as model_folder

if TYPE_CHECKING:
    from tasks.training.grpo_trainer import AdapterTrainer

MEMORY = Path("/dev/shm")
CHECKED = 8  # completions per sync whose log-probabilities are compared: two forward passes over each
TIMES = 3.0  # multiple of the noise floor that the engine may differ by
LEAST_FLOOR = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # smaller differences of log-probabilities are rounding
SIGNIFICANT = 6.0  # standard deviations of noise between old and new weights that make them distinguishable: 3 to the middle


@dataclass(frozen=True)
class Floor:
    """Differences of log-probabilities between engine and trainer when both surely hold the same weights: the base's."""

    furthest: float
    deviation: float


@contextmanager
def start(request: Request, stage: GrpoStage, found: Targets, longest: int, gpus: list[str] | None, events: Events) -> Iterator[Rollouts]:
    """Start one engine for all processes of this training, and stop it at the end. `longest`: tokens of a prompt and its completion."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    assert request.engine is not None
    settings = stage.resources.engine or EngineSettings()
    model, dtype = model_folder(request.inputs["model"].path), compute_type(stage)
    if experts := [name for name, matrices in found.parameters.items() if matrices > 1]:
        message = f"rollouts.engine: found vllm for an adapter of experts, which vLLM reads under other names: {experts[0]}"
        others = ", ".join(found.others())
        raise StageFailed("config", message, f"set `rollouts: {{engine: transformers}}`, or `target_modules: [{others}]` in `lora:`")
    adapters = Adapters(stage.lora.highest_rank(), {layer.rsplit(".", 1)[-1] for layer in found.layers})
    first = PartialState().is_main_process
    with folder_in_memory(request.key) as folder:
        log = request.work / ENGINE_LOG
        engine = Engine(Place(request.engine, log, gpus, folder), model, settings, stage.dtype, longest, adapters)
        try:
            began = time.monotonic()
            if first:
                print(f"starting vLLM: its log is {log}", flush=True)
                events.progress(0, stage.max_steps or 1, "starting vLLM")
                engine.__enter__()
                print(f"vLLM is ready after {time.monotonic() - began:.0f} s", flush=True)
            (address,) = broadcast_object_list([engine.address if first else None])
            if not first:
                engine.join(address)
            yield Rollouts(request, stage, engine, folder, dtype, events)
        finally:
            if first:
                shutil.copy(log, request.meta / ENGINE_LOG)
                engine.__exit__(None, None, None)


@contextmanager
def folder_in_memory(key: str) -> Iterator[Path]:
    """Yield a folder in memory, removed at the end. The server's watchdog removes it if this process is killed; if the watchdog is
    killed as well, the next training removes it."""
    place = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
    for left in place.glob("tuneline-*/lock"):
        with left.open() as lock:
            if not try_lock(lock.fileno()):
                continue  # its training is running
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"tuneline-{key[:12]}-", dir=place))
    with hold_lock(folder / "lock"):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Rollouts:
    """TRL's `rollout_func`: returns one completion for each prompt, sampled from the current adapter."""

    def __init__(self, request: Request, stage: GrpoStage, engine: Engine, folder: Path, dtype: torch.dtype, events: Events):
        self.request, self.stage, self.engine, self.folder, self.dtype, self.events = request, stage, engine, folder, dtype, events
        self.floor: Floor | None = None
        self.name: str | None = None
        self.syncs = 0
        self.weights: dict[str, torch.Tensor] | None = None  # of the last sync; None while the engine only has the base

    def __call__(self, prompts: list[str], trainer: AdapterTrainer) -> dict[str, list[Any]]:
        ids = [trainer.prompts[prompt] for prompt in prompts]  # each repeated for its completions in this process
        if self.floor is None:
            self.floor = self.measure(trainer, ids)
        previous, began = self.weights, time.monotonic()
        size = self.sync(trainer)
        seconds = time.monotonic() - began
        completions = self.sample(trainer, ids, str(self.name))
        furthest = self.check(trainer, ids, completions, previous)
        log = trainer._metrics["train"]
        everyones = trainer.accelerator.gather(torch.tensor([furthest], device=trainer.accelerator.device))  # NCCL needs a tensor on a GPU
        log["freshness_max_logprob_diff"].append(float(everyones.max()))
        log["sync_seconds"].append(seconds)
        log["sync_bytes"].append(float(size))
        return {
            "prompt_ids": ids,
            "completion_ids": [completion.ids for completion in completions],
            "logprobs": [completion.logprobs for completion in completions],
        }

    def sample(self, trainer: AdapterTrainer, ids: list[list[int]], name: str) -> list[Completion]:
        step, index = trainer.state.global_step, trainer.accelerator.process_index
        said = time.monotonic()

        def done(finished: int, tokens: int) -> None:
            nonlocal said
            if index == 0 and time.monotonic() - said > 2:
                said = time.monotonic()
                self.events.progress(step, trainer.state.max_steps, f"sampling: {finished} of {len(ids)} completions, {tokens} tokens")

        seed = int.from_bytes(hashlib.sha256(f"{self.request.seed} {step} {index}".encode()).digest()[:4], "big") >> 1
        stage = self.stage
        sampling = Sampling(stage.max_completion_length, stage.temperature, stage.top_p, stage.top_k, trainer.eos_token_ids)
        return self.engine.generate(ids, sampling, model=name, seed=seed, done=done)

    # --- syncs ---

    def sync(self, trainer: AdapterTrainer) -> int:
        """Hand the adapter over. Returns its size in bytes."""
        self.syncs += 1
        accelerator = trainer.accelerator
        model = accelerator.unwrap_model(trainer.model)
        self.weights = adapter_tensors(model)
        content = hashlib.sha256(b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in self.weights.values())).hexdigest()
        before, self.name = self.name, f"sync-{self.syncs}-step-{trainer.state.global_step}-{content[:16]}"
        size: int = sum(tensor.nbytes for tensor in self.weights.values())
        if accelerator.is_main_process:
            place = self.folder / self.name
            place.mkdir()
            save_adapter(model, self.weights, place, self.request.inputs["model"], self.stage.lora)
            self.engine.load(self.name, place)
            if before:
                self.engine.unload(before)
                shutil.rmtree(self.folder / before)
        accelerator.wait_for_everyone()
        return size

    # --- freshness ---

    def measure(self, trainer: AdapterTrainer, ids: list[list[int]]) -> Floor:
        """Measure the noise floor with the base model, which is surely the same in both."""
        completions = self.sample(trainer, ids, BASE)
        with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
            differences = self.engine_log_probs(completions) - self.log_probs(trainer, ids, completions)
        # If the base is sure of every token, no noise is visible; rounding is always possible.
        least = 8 * torch.finfo(self.dtype).eps
        floor = Floor(float(differences.abs().max()), max(least, float(differences.square().mean().sqrt())))
        print(f"noise between vLLM and the trainer: log-probabilities of the base differ by up to {floor.furthest:.2g}", flush=True)
        return floor

    def check(
        self, trainer: AdapterTrainer, ids: list[list[int]], completions: list[Completion], previous: dict[str, torch.Tensor] | None
    ) -> float:
        """Return the largest difference between the engine's log-probabilities and the trainer's. Raises StageFailed(bug) if the
        difference exceeds noise, or the engine is closer to the previous weights and these differ enough."""
        assert self.floor is not None
        engine, now = self.engine_log_probs(completions), self.log_probs(trainer, ids, completions)
        before = self.log_probs_before(trainer, ids, completions, previous)
        furthest = float((engine - now).abs().max())
        step, allowed = trainer.state.global_step, TIMES * max(self.floor.furthest, LEAST_FLOOR[self.dtype])
        if not furthest <= allowed:
            raise StageFailed(
                "bug",
                f"vLLM does not sample from the trained weights: at step {step} its log-probabilities differ from the trainer's by up to "
                f"{furthest:.2g}, expected at most {allowed:.2g}",
                "it serves another adapter or none, or computes this model differently: `rollouts: {engine: transformers}` needs no vLLM",
            )
        apart = float((now - before).square().sum().sqrt())
        off, stale = float((engine - now).square().sum().sqrt()), float((engine - before).square().sum().sqrt())
        if apart > SIGNIFICANT * self.floor.deviation and stale < off:
            raise StageFailed(
                "bug",
                f"vLLM samples from stale weights: at step {step} its log-probabilities differ by {stale:.2g} from those of the previous "
                f"weights and by {off:.2g} from those of the current ones (root of the sum of squares over {len(engine)} tokens)",
                "it serves an adapter of another step: please report this, with the engine's log",
            )
        return furthest

    def log_probs_before(
        self, trainer: AdapterTrainer, ids: list[list[int]], completions: list[Completion], previous: dict[str, torch.Tensor] | None
    ) -> torch.Tensor:
        model: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
        if previous is None:
            with model.disable_adapter():
                return self.log_probs(trainer, ids, completions)
        assert self.weights is not None
        set_peft_model_state_dict(model, previous)
        try:
            return self.log_probs(trainer, ids, completions)
        finally:
            set_peft_model_state_dict(model, self.weights)

    def engine_log_probs(self, completions: list[Completion]) -> torch.Tensor:
        return torch.tensor([value for completion in completions[:CHECKED] for value in completion.logprobs])

    def log_probs(self, trainer: AdapterTrainer, ids: list[list[int]], completions: list[Completion]) -> torch.Tensor:
        """Compute the trainer's log-probabilities of the first completions, one sequence at a time: all logits might not fit a GPU."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = []
        training = model.training
        model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for prompt, completion in list(zip(ids, completions, strict=True))[:CHECKED]:
                sequence = torch.tensor([prompt + completion.ids], device=model.device)
                logits = model(input_ids=sequence, logits_to_keep=len(completion.ids) + 1).logits[0, :-1].float()
                found.append(logits.log_softmax(-1).gather(-1, sequence[0, len(prompt) :, None])[:, 0].cpu())
        model.train(training)
        return torch.cat(found)

    def facts(self) -> dict[str, Any]:
        """Return facts for users, shown beside the manifest's metrics."""
        weights = model_folder(self.request.inputs["model"].path)
        whole = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
        floor = self.floor or Floor(math.nan, math.nan)
        return {"noise_floor": f"{floor.furthest:.2g}", "model_bytes": whole}
