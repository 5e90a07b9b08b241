"""Fields that every stage has. They only change how the stage runs and are not in its key.

The class of a kind is the only place that knows its checks, its program, its columns in tables and what vLLM can serve. No
other module names a kind to decide one of these.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.engine import CPU_RUNTIME, GPU_RUNTIME, EngineSettings
from tuneline.kinds.fields import ArtifactType, Name, StageRef, Strict
from tuneline.kinds.outside import ReadsOutside
from tuneline.wording import listed

# Fields of `resources` that only trainings use. Evaluations in several processes use `collective_timeout`, too.
TRAINING_ONLY = (
    "strategy", "offload", "sequence_parallel_size", "gradient_checkpointing",
    "activation_offloading", "attn_implementation", "kernels", "compile",
    "checkpoint_steps", "checkpoint_minutes", "checkpoints_kept",
)  # fmt: skip


Attention = Literal["auto", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager"]


class Resources(Strict):
    """Settings of how a stage runs; none of them is in the cache key."""

    gpus: int = Field(0, ge=0)
    """Number of GPUs per machine; a training, or an evaluation by transformers, runs one process per GPU."""
    devices: tuple[int, ...] | None = Field(None, min_length=1)
    """Indices of the GPUs to use; by default any free ones."""
    processes: int | None = Field(None, ge=1)
    """Number of processes per machine of a training or an evaluation; by default one per GPU, or one without GPUs."""
    nodes: int = Field(1, ge=1)
    """Number of machines that train together; run `tuneline node` on each but the first."""
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "device_map"] = "ddp"
    """How to distribute a training over devices. `ddp`: a full replica on each; DeepSpeed shards optimizer states (`zero1`), gradients
    as well (`zero2`), and weights as well (`zero3`); `fsdp`: torch's FSDP2 shards all three; `device_map`: one process places different
    layers on different devices."""
    offload: Literal["optimizer", "all"] | None = None
    """What to offload to CPU memory: `optimizer` states, or weights as well (`all`, for `zero3` and `fsdp`). Saves GPU memory, but is
    slower."""
    sequence_parallel_size: int = Field(1, ge=1)
    """Number of processes that share each sequence (Ulysses, arXiv:2309.14509), for sequences whose activations exceed one device."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Per-device batch size, in rows; halved automatically after an out-of-memory error. By default at most 8 in trainings (4 pairs with
    dpo, 1 with packing), and 16 in evaluations."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offloading: bool = False
    """Move activations to CPU memory until the backward pass: less GPU memory, slower where the bus is slow."""
    attn_implementation: Attention = "auto"
    """Implementation of attention, under transformers' names. `auto` on a GPU: `flash_attention_3` or `flash_attention_2`, if its package
    is in the runtime and suits GPU, model and dtype; else torch's `sdpa`, or `eager` for models that lack it."""
    kernels: Literal["liger"] | None = None
    """Kernels of layers: `liger`, fused ones for GPUs (arXiv:2410.10989); the runtime needs the package liger-kernel."""
    compile: bool = False
    """Compile the model by torch.compile: the first steps take minutes, later ones are faster if rows have similar lengths."""
    checkpoint_steps: int = Field(50, ge=1)
    """Save a checkpoint every N steps; an interrupted training resumes from the newest. With early stopping or save_best, checkpoints are
    saved at each evaluation instead."""
    checkpoint_minutes: float | None = Field(None, gt=0)
    """Save a checkpoint every N minutes instead of every checkpoint_steps; with early stopping or save_best, in addition to those at
    evaluations."""
    checkpoints_kept: int = Field(2, ge=2)
    """Number of newest checkpoints kept during a training; all are deleted once it succeeds."""
    collective_timeout: int = Field(1800, ge=1)
    """Seconds that processes wait for one another, in a collective operation or at the end of an evaluation's rows; the attempt then fails
    and is retried."""

    engine: EngineSettings | None = None
    """Settings of vLLM, for stages that use it."""

    @property
    def world_size(self) -> int:
        """Number of processes over all machines: one per GPU that is not reserved for the engine."""
        return self.nodes * self.local_processes

    @property
    def data_parallel_size(self) -> int:
        """Number of micro-batches processed at the same time."""
        return max(1, self.world_size // self.sequence_parallel_size)

    @property
    def uses_deepspeed(self) -> bool:
        return self.strategy.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds only a part of the weights."""
        return self.strategy in ("zero3", "fsdp")

    @property
    def local_processes(self) -> int:
        """Number of processes of one machine."""
        if self.strategy == "device_map":
            return 1
        return self.processes or max(1, self.gpus - (self.engine.gpus if self.engine else 0))


class Stage(ReadsOutside):
    """Fields that every stage has; none of them is in the cache key."""

    figures: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics that tables show; all if empty."""
    role: ClassVar[str] = ""
    """Name of the stage's model in tables that compare models: `base`, `merged`."""
    also_called: ClassVar[tuple[str, ...]] = ()
    """Names of the kind in other tools; the message about an unknown kind uses them to suggest this one."""
    quantized: ClassVar[bool] = False
    """Whether the stage outputs a model with quantized weights."""
    kind: str
    description: str = ""
    """Description shown in tables and reports."""
    needs: tuple[StageRef, ...] = ()
    """Stages that must succeed before this one, without being an input."""
    retries: int = Field(2, ge=0, le=20)
    """Maximum number of retries after an out-of-memory or transient failure; other failures are never retried."""
    timeout: int | None = Field(None, ge=1)
    """Time limit of the stage, in seconds; it is stopped afterwards."""

    @abstractmethod
    def output_type(self) -> ArtifactType:
        """Return the type of artifact that the stage produces."""

    def problems(self) -> Iterator[Problem]:
        """Yield problems between fields of this stage."""
        return iter(())

    def upstream_problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Yield problems between this stage and those that it names. `stages`: the pipeline's stages that have valid types."""
        return iter(())

    def warnings(self) -> Iterator[Problem]:
        """Yield settings that are valid but suspicious; shown by every validate, plan and run."""
        return iter(())

    def made_from(self) -> str | None:
        """Return the stage whose model this stage modifies. Both models have the same architecture."""
        return None

    def held_out(self) -> Iterator[tuple[str, str, str]]:
        """Yield (field, dataset stage, split) for each held-out split that the stage reads."""
        return iter(())

    def holds_out(self, split: str) -> bool:
        """Return whether a dataset stage holds out rows for `split`; True for other kinds."""
        return True

    def unserved(self, by: ComputingStage) -> str | None:
        """Return why vLLM cannot serve the stage's model to `by`, or None if it can."""
        return None

    def metric_problem(self, name: str, metric: str, stages: Mapping[str, Stage]) -> tuple[str, str] | None:
        """Return (message, hint) if this stage, called `name`, cannot report that metric: only evaluations score datasets."""
        dataset = stages.get(metric.partition("/")[0])
        if dataset is None or dataset.output_type() != "Dataset" or self.output_type() == "Verdict":
            return None
        return f"found `{metric}` of `{name}`, which is not an evaluation", "name a stage of kind evaluate"

    def incomparable_fields(self, other: Stage, metric: str) -> list[str]:
        """Return the fields in which two evaluations differ so that their values of `metric` answer different questions."""
        return []


class ProgramStage(Stage):
    """A stage that runs a program of `tasks/`."""

    program: ClassVar[str]
    """Module of the program; it has a function `run`."""
    libraries: ClassVar[tuple[str, ...]]
    """Libraries of the program whose versions affect its output; they are in the key. tests/core/test_libraries.py compares them with
    what the program imports."""
    imports: ClassVar[tuple[str, ...]] = ()
    """Modules that import nearly everything that the program needs in any case."""
    trains: ClassVar[bool] = False
    """Whether the program trains. Only trainings run on several machines and write checkpoints."""
    parallel: ClassVar[bool] = False
    """Whether the program can run in several processes."""
    batches: ClassVar[bool] = False
    """Whether the program processes batches of `micro_batch_size` rows."""
    describes_history: ClassVar[bool] = False
    """Whether the output describes how the inputs were made. Then their history, with the stages' names, is in the key as well."""

    runtime: Name = "torch"
    """Python environment of the stage. Stages of kind `quantize` default to `quantize`, because gptqmodel needs older libraries."""
    resources: Resources = Resources()
    """Devices, processes and batches."""
    pool: Name | None = None
    """Work pool for this stage alone: once the pipeline is deployed, the stage is a separate run there. `tuneline run` ignores it."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Random seed of the stage."""

    def decided(self) -> dict[str, Any]:
        """Return the values that `auto` stands for, decided by the file alone. They are in the key and in the program's request."""
        return {}

    def libraries_in_key(self) -> tuple[str, ...]:
        return self.libraries

    def packages(self) -> frozenset[str]:
        """Return the large packages that the program imports; all others are hidden from it, as libraries import what they find."""
        sharded = self.resources.uses_deepspeed or self.resources.sequence_parallel_size > 1
        return frozenset({"torch", "deepspeed"} if sharded else {"torch"})

    def runs_user_code(self) -> bool:
        """Return whether code of the user or of a model runs in the program; it may import any package."""
        return False

    def common_problems(self) -> Iterator[Problem]:
        devices = self.resources.devices
        if devices is not None and (len(devices) != self.resources.gpus or len(set(devices)) != len(devices) or min(devices) < 0):
            found = f"found {list(devices)}, expected as many different GPU indices as resources.gpus, {self.resources.gpus}"
            yield Problem("resources.devices", found, f"set `gpus: {len(devices)}`" if len(devices) != self.resources.gpus else "")
        engine = self.resources.engine
        if engine is not None and not self.uses_engine():
            yield Problem(
                "resources.engine", "found engine settings in a stage that does not use vLLM", "remove them, or choose vLLM for the stage"
            )
        elif engine is not None and engine.gpus > self.resources.gpus:
            found = f"found {engine.gpus}, expected at most resources.gpus, {self.resources.gpus}"
            yield Problem("resources.engine.gpus", found, "raise resources.gpus: it includes the engine's GPUs")

        alone = () if self.trains else ("nodes",) if self.parallel else ("nodes", "processes", "gpus")
        if field := next((name for name in alone if (getattr(self.resources, name) or 1) > 1), None):
            found = f"found {getattr(self.resources, field)} for {self.kind}, expected 1"
            hint = "write `gpus: 1`" if field == "gpus" else "remove it"
            several = "run on several machines" if field == "nodes" else "and evaluations run in several processes"
            yield Problem(f"resources.{field}", found, f"{hint}: only trainings {several}")
        elif not self.trains:
            unused = TRAINING_ONLY if self.world_size() > 1 else (*TRAINING_ONLY, "collective_timeout")
            yield from self._without_effect(unused, "is not a training")
            if not self.batches:
                yield from self._without_effect(("micro_batch_size",), "does not use batches")

    def _without_effect(self, fields: Iterable[str], why: str) -> Iterator[Problem]:
        """Yield one problem that names all of these fields of `resources` that are set."""
        given = [field for field in fields if getattr(self.resources, field) != Resources.model_fields[field].default]
        if given:
            found = f"found {listed(given)} for {self.kind}, which {why}"
            yield Problem(f"resources.{given[0]}", found, "remove it" if len(given) == 1 else "remove them")

    def uses_engine(self) -> bool:
        """Return whether the stage uses vLLM."""
        return False

    def engine_runtime(self) -> str | None:
        """Return the runtime with vLLM, or None if the stage does not use it."""
        if not self.uses_engine():
            return None
        named = self.resources.engine.runtime if self.resources.engine else None
        return named or (GPU_RUNTIME if self.resources.gpus else CPU_RUNTIME)

    def runtimes(self) -> list[str]:
        """Return all runtimes that the stage uses."""
        engine = self.engine_runtime()
        return [self.runtime, engine] if engine else [self.runtime]

    def world_size(self) -> int:
        """Return the number of processes that the stage runs in."""
        return self.resources.world_size

    def launched(self) -> bool:
        """Return whether torchrun starts the processes: for several, and for DeepSpeed, which needs its environment."""
        return self.world_size() > 1 or self.resources.uses_deepspeed

    def micro_batch_size(self) -> int | None:
        """Return the per-device batch size; None for kinds that do not use batches."""
        return None

    def smaller_micro_batch(self, size: int) -> int | None:
        """Return the batch size to try after an out-of-memory error at `size`: about half, or None at the minimum."""
        return size // 2 or None


ComputeType = Literal["float32", "bfloat16"]


class ComputingStage(ProgramStage):
    """A stage whose result depends on the data type that its model computes in."""

    dtype: Literal["auto", ComputeType] = "auto"
    """Data type that the model computes in; `auto` is bfloat16 if the stage has GPUs (`resources.gpus`), else float32. The resulting type
    is in the cache key."""

    def compute_type(self) -> ComputeType:
        """Return the compute type. It depends on the file alone, because the key must be known before the machine is."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.resources.gpus else "float32"

    def decided(self) -> dict[str, Any]:
        return {"dtype": self.compute_type()}
