"""pipelines.yaml as types: the whole file format, one model a stage kind.

A field's description says its effect. `Reference` marks a field that names another stage; `OutsideFile` one that names a
file or folder beside pipelines.yaml. Everything in `Stage` (the base class) only changes how a stage runs and is never in
its key; everything a kind adds changes the result and is. Checks that need more than one field are `findings()`; those that
need more than one stage are in `tuneline.load`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneline.data_sources import CodeSource, Source
from tuneline.fields import (
    AdapterRef,
    ArtifactType,
    DatasetRef,
    Finding,
    ModelOrAdapterRef,
    ModelRef,
    Name,
    Path,
    Repository,
    Revision,
    StageRef,
    Strict,
)
from tuneline.pools import AnyPool, Schedule

SHARD = r"^(0\.\d*[1-9]\d*|[1-9]\d*(\.\d+)?)(MB|GB)$"
Share = Annotated[float, Field(ge=0, lt=1)]


# --- how a stage runs -------------------------------------------------------------------------------------------------


class Resources(Strict):
    """Only how a stage runs: none of it is in the key."""

    gpus: int = Field(0, ge=0)
    """Devices used; with more than one, one process each."""
    devices: tuple[int, ...] | None = Field(None, min_length=1)
    """Numbers of the devices to use; by default any that are free."""
    processes: int | None = Field(None, ge=1)
    """Processes of a training; by default one for each GPU, or one."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows a device takes at once; halved by itself after an out-of-memory. By default up to 8, one when packing."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass: less memory, about a third more time."""
    checkpoint_steps: int = Field(50, ge=1)
    """Steps between the checkpoints from which a killed training resumes; early stopping saves at each evaluation instead."""

    @property
    def world_size(self) -> int:
        return self.processes or max(1, self.gpus)


class Stage(Strict):
    """Fields that every stage has; none of them is in the key."""

    kind: str
    description: str = ""
    """Shown in tables and reports."""
    needs: tuple[StageRef, ...] = ()
    """Stages that must succeed first, without being an input."""
    retries: int = Field(2, ge=0, le=20)
    """Further attempts after an out-of-memory or a passing failure; other failures are never tried again."""
    timeout: int | None = Field(None, ge=1)
    """Seconds after which the stage is ended."""

    gives: ClassVar[ArtifactType]

    def findings(self) -> Iterator[Finding]:
        return iter(())

    def warnings(self) -> Iterator[Finding]:
        """What is allowed and all the same worth a word at every validate, plan and run."""
        return iter(())


class ProgramStage(Stage):
    """A stage that a program in `tasks/` carries out."""

    runtime: Name = "torch"
    """The Python environment it runs in."""
    resources: Resources = Resources()
    """Devices and batches."""
    pool: Name | None = None
    """Pool that this stage runs in, as a run of its own, once the pipeline is deployed; `tuneline run` runs it here."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random in the stage."""

    def common_findings(self) -> Iterator[Finding]:
        devices = self.resources.devices
        if devices is not None and (len(devices) != self.resources.gpus or len(set(devices)) != len(devices) or min(devices) < 0):
            found = f"found {list(devices)}, allowed as many different numbers as resources.gpus, {self.resources.gpus}"
            yield Finding("resources.devices", found, f"set `gpus: {len(devices)}`" if len(devices) != self.resources.gpus else "")

    def micro_batch_size(self) -> int | None:
        """Rows a device takes at once; None for a kind that does not work in batches."""
        return self.resources.micro_batch_size

    def smaller_micro_batch(self, size: int) -> int | None:
        """What to try after an out-of-memory at `size`: about half; None where nothing is smaller."""
        return size // 2 or None


# --- model ------------------------------------------------------------------------------------------------------------


class ModelStage(ProgramStage):
    """A base model: fetched, pinned and checked."""

    kind: Literal["model"]
    hub: Repository | None = None
    """Repository of the model hub, `owner/name`."""
    revision: Revision = "main"
    """Branch, tag or commit of the hub repository; its commit is in the key."""
    path: Path | None = None
    """Local model folder; kept by reference, not copied."""
    gguf: Path | None = None
    """Local GGUF file; converted to safetensors in float32."""
    trust_remote_code: bool = False
    """Runs Python files that come with the model, here and in every later stage. Only for sources that you trust."""

    gives: ClassVar[ArtifactType] = "Model"

    def findings(self) -> Iterator[Finding]:
        given = [name for name in ("hub", "path", "gguf") if getattr(self, name) is not None]
        if len(given) != 1:
            yield Finding("", f"found {' and '.join(given) or 'no source'}, allowed exactly one of hub, path, gguf")
        if self.hub is None and self.revision != "main":
            yield Finding("revision", "found a revision without hub", "only hub repositories have revisions")
        if self.trust_remote_code and self.gguf is not None:
            yield Finding("trust_remote_code", "found trust_remote_code with gguf, which holds no code", "remove it")

    def warnings(self) -> Iterator[Finding]:
        if self.trust_remote_code:
            yield Finding("trust_remote_code", "Python files that come with this model are run")


# --- dataset ----------------------------------------------------------------------------------------------------------


class Split(Strict):
    validation: Share = 0.0
    """Share of the groups held out to watch a training."""
    test: Share = 0.1
    """Share of the groups held out for evaluation."""


class DatasetStage(ProgramStage):
    """Rows from one or more sources: cleaned, deduplicated, split by group and reported on."""

    kind: Literal["dataset"]
    model: ModelRef | None = None
    """Model whose tokenizer and template count tokens and render samples."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """Where rows come from, in order."""
    system: str | None = None
    """System prompt put before conversations that have none."""
    split: Split = Split()
    """Shares held out."""
    max_length: int | None = Field(None, ge=8)
    """Tokens a rendered row may have."""
    over_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a row over max_length; only plain text can be truncated. Counted in the report."""

    gives: ClassVar[ArtifactType] = "Dataset"

    def findings(self) -> Iterator[Finding]:
        if self.max_length is not None and self.model is None:
            yield Finding("max_length", "found max_length without model", "name the model whose tokenizer counts: `model: base`")
        for i, source in enumerate(self.sources):
            if isinstance(source, CodeSource) and self.model is None:
                hint = "name the model whose tokenizer cuts the chunks: `model: base`"
                yield Finding(f"sources.{i}", "found source code without model", hint)
            if isinstance(source, CodeSource) and self.max_length is not None and source.chunk_length > self.max_length:
                message = f"found {source.chunk_length}, allowed at most max_length, {self.max_length}"
                yield Finding(f"sources.{i}.chunk_length", message, "a longer chunk would be dropped or cut as every row is")
        if self.split.validation + self.split.test >= 1:
            yield Finding("split", f"found {self.split.validation} + {self.split.test}, allowed a sum below 1")


# --- sft --------------------------------------------------------------------------------------------------------------


class Lora(Strict):
    """Low-rank adapters, in PEFT's words."""

    r: int = Field(16, ge=1, le=1024)
    """Rank: more can learn more, and takes more memory."""
    lora_alpha: float = Field(32, gt=0)
    """Strength: the update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of adapter inputs dropped while training."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Layers that get an adapter: names of linear layers, or all of them but the head."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv:2402.09353): often better, slower."""


class EarlyStopping(Strict):
    patience: int = Field(3, ge=1)
    """Evaluations without a better validation loss after which training ends; the best adapter is kept."""
    threshold: float = Field(0.0, ge=0)
    """Least improvement that counts."""


class SftStage(ProgramStage):
    """Supervised fine-tuning of a LoRA adapter, by TRL and PEFT."""

    kind: Literal["sft"]
    model: ModelRef
    """Base model, frozen."""
    dataset: DatasetRef
    """Rows to train on: its train split; its validation split is watched."""
    adapter: AdapterRef | None = None
    """Adapter of the same base to go on from."""
    lora: Lora = Lora()
    """Shape of the adapter."""
    train_on: Literal["completion", "assistant", "all"] = "assistant"
    """Tokens that count in the loss: the last answer, every assistant turn, or everything. Plain text: always all."""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Highest step size, reached after the warm-up."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: float = Field(0, ge=0)
    """Steps of warm-up; below 1, a share of all steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Pull of the weights towards zero (AdamW's)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the data, unless max_steps is given."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(16, ge=1)
    """Sequences per optimizer step over all devices; packed ones when packing."""
    max_length: int = Field(1024, ge=8)
    """Tokens a sequence may have, and the length of a packed one. A longer row is an error: cut it in the dataset stage."""
    packing: bool = False
    """Fills sequences with several rows: fewer, fuller steps."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between losses on the validation split."""
    early_stopping: EarlyStopping | None = None
    """Ends training when the validation loss no longer falls."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; `auto` is bfloat16 where the hardware is fast at it, else float32."""

    gives: ClassVar[ArtifactType] = "Adapter"

    def micro_batch_size(self) -> int:
        """Rows one device takes at once: as given, or the largest divisor of its share that is at most 8.

        Packed sequences are full already, and are joined into one: attention would cost the square of their number.
        """
        share = max(1, self.global_batch_size // self.resources.world_size)
        most = 1 if self.packing else min(8, share)
        return self.resources.micro_batch_size or max(n for n in range(1, most + 1) if share % n == 0)

    def smaller_micro_batch(self, size: int) -> int | None:
        share = self.global_batch_size // self.resources.world_size
        return max((n for n in range(1, size // 2 + 1) if share % n == 0), default=None)

    def findings(self) -> Iterator[Finding]:
        world, micro = self.resources.world_size, self.micro_batch_size()
        if self.global_batch_size % (micro * world):
            yield Finding(
                "global_batch_size",
                f"found {self.global_batch_size}, allowed multiples of {micro * world} "
                f"(micro_batch_size {micro} x {world} {'process' if world == 1 else 'processes'})",
                "change resources.micro_batch_size: it does not change the result",
            )
        if self.early_stopping and self.eval_steps is None:
            yield Finding("early_stopping", "found early_stopping without eval_steps", "set `eval_steps: 20`, say")
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            yield Finding(
                "lr_scheduler_type",
                "found constant with warmup_steps, which it ignores",
                "set `lr_scheduler_type: constant_with_warmup`",
            )


# --- evaluate ---------------------------------------------------------------------------------------------------------


class EvaluateStage(ProgramStage):
    """Benchmarks of lm-eval and test splits of datasets, on a model or an adapter."""

    kind: Literal["evaluate"]
    model: ModelOrAdapterRef
    """What is evaluated."""
    datasets: tuple[DatasetRef, ...] = ()
    """Datasets whose test split is scored: exact match, answer recall, bits per byte."""
    benchmarks: tuple[str, ...] = ()
    """lm-eval tasks by name."""
    include_path: Path | None = None
    """Folder with lm-eval task files of your own."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples put before each benchmark question; by default as the benchmark says."""
    limit: int | None = Field(None, ge=1)
    """Rows scored at most: a benchmark's first, of a dataset evenly from all of its test rows."""
    apply_chat_template: bool = True
    """Renders benchmark questions through the chat template; a dataset's conversations always are, as in training."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer to a dataset's prompt."""
    allow_code_execution: bool = False
    """Lets a benchmark run the code that the model writes, in a sandbox: `human_eval` needs it."""

    gives: ClassVar[ArtifactType] = "Report"

    def micro_batch_size(self) -> int:
        return self.resources.micro_batch_size or 16

    def findings(self) -> Iterator[Finding]:
        if not self.datasets and not self.benchmarks:
            yield Finding("", "found neither datasets nor benchmarks, allowed one or both", "add `datasets: [my-data]`")
        if "human_eval" in self.benchmarks and not self.allow_code_execution:
            hint = "set `allow_code_execution: true`: it runs what the model writes, in a sandbox"
            yield Finding(f"benchmarks.{self.benchmarks.index('human_eval')}", "found human_eval without allow_code_execution", hint)


# --- merge, quantize --------------------------------------------------------------------------------------------------


class MergeStage(ProgramStage):
    """An adapter folded into its base, shard by shard."""

    kind: Literal["merge"]
    adapters: tuple[AdapterRef, ...] = Field(min_length=1, max_length=1)
    """The adapter; its base is found by itself."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights written; `auto` keeps the base's."""
    max_shard_size: str = Field("5GB", pattern=SHARD)
    """Largest weight file."""

    gives: ClassVar[ArtifactType] = "Model"


class QuantizeStage(ProgramStage):
    """Weights of fewer bits by GPTQ (arXiv:2210.17323), through gptqmodel."""

    kind: Literal["quantize"]
    method: Literal["gptq"] = "gptq"
    """How weights are rounded."""
    model: ModelRef
    """Model to quantize, in full precision."""
    calibration: DatasetRef
    """Dataset whose train split calibrates, rendered as in training; its test split measures perplexity."""
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 16, 32, 64, 128, 256] = 128
    """Weights that share a scale; must divide the model's width. Smaller is better and larger on disk."""
    desc_act: bool = False
    """Quantizes important columns first: better, slower to serve."""
    sym: bool = True
    """Symmetric around zero."""
    samples: int = Field(128, ge=1)
    """Calibration rows, drawn with the seed."""
    max_length: int = Field(2048, ge=8)
    """Tokens of a calibration row; longer ones are cut."""
    max_perplexity_ratio: float = Field(1.5, gt=1)
    """The stage fails where perplexity rises by more than this factor."""

    gives: ClassVar[ArtifactType] = "Model"


# --- gate -------------------------------------------------------------------------------------------------------------


class Requirement(Strict):
    """A condition on one metric: at_least, at_most, improves_on (by), or not_below (tolerance)."""

    metric: str
    """`<dataset stage or benchmark>/<metric>`, or a metric of the stage itself."""
    of: StageRef
    """Stage whose metric it is."""
    at_least: float | None = None
    """Least value allowed."""
    at_most: float | None = None
    """Greatest value allowed."""
    improves_on: StageRef | None = None
    """Stage whose same metric must be exceeded by `by`."""
    by: float = Field(0.0, ge=0)
    """Least improvement."""
    not_below: StageRef | None = None
    """Stage whose same metric, less `tolerance`, is the least allowed."""
    tolerance: float = Field(0.0, ge=0)
    """Loss allowed."""


class GateStage(Stage):
    """Lets the pipeline pass only if every requirement holds. Never cached."""

    kind: Literal["gate"]
    require: tuple[Requirement, ...] = Field(min_length=1)
    """All of them must hold."""

    gives: ClassVar[ArtifactType] = "Verdict"

    def findings(self) -> Iterator[Finding]:
        choices = ("at_least", "at_most", "improves_on", "not_below")
        for i, requirement in enumerate(self.require):
            given = [name for name in choices if getattr(requirement, name) is not None]
            if len(given) != 1:
                yield Finding(f"require.{i}", f"found {' and '.join(given) or 'no condition'}, allowed exactly one of {', '.join(choices)}")
            for other in ("improves_on", "not_below"):
                if getattr(requirement, other) == requirement.of:
                    yield Finding(f"require.{i}.{other}", f"found `{requirement.of}`, the stage itself", "compare it with another stage")
            for extra, owner in (("by", "improves_on"), ("tolerance", "not_below")):
                if extra in requirement.model_fields_set and owner not in given:
                    yield Finding(f"require.{i}.{extra}", f"found {extra} without {owner}")


# --- the file ---------------------------------------------------------------------------------------------------------

AnyStage = Annotated[
    ModelStage | DatasetStage | SftStage | EvaluateStage | MergeStage | QuantizeStage | GateStage, Field(discriminator="kind")
]
STAGES: dict[str, type[Stage]] = {
    "model": ModelStage,
    "dataset": DatasetStage,
    "sft": SftStage,
    "evaluate": EvaluateStage,
    "merge": MergeStage,
    "quantize": QuantizeStage,
    "gate": GateStage,
}


class Runtime(Strict):
    """A Python environment: a lock file that tuneline installs, or a Python that is there already."""

    lock: Path | None = None
    """Lock file, relative to pipelines.yaml."""
    python: str | None = None
    """Python of an environment of your own."""


class Pipeline(Strict):
    description: str = ""
    """Shown in tables and reports."""
    salt: str = ""
    """Changing it disowns every earlier artifact of this pipeline."""
    parallel: int | None = Field(None, ge=1)
    """Stages that may run at the same time; by default one for each GPU of the machine, or one."""
    pool: Name | None = None
    """Pool that it runs in once deployed. Without one it is not deployed."""
    queue: Name | None = None
    """Queue of that pool."""
    tags: tuple[str, ...] = ()
    """Tags of its runs in Prefect, beside its name."""
    schedules: dict[Name, Schedule] = {}
    """When it runs by itself, by name."""
    stages: dict[Name, AnyStage] = Field(min_length=1)
    """Stages by name; order is free."""


class Spec(Strict):
    """A whole pipelines.yaml."""

    version: Literal[1]
    """Version of this file format."""
    store: str = ".tuneline/store"
    """Folder of artifacts."""
    roots: tuple[str, ...] = ()
    """Folders outside of this file's own that its paths may lead into, such as `/data/models`."""
    vars: dict[str, bool | int | float | str] = {}
    """Values for `${name}` anywhere in the file."""
    runtimes: dict[Name, Runtime] = {}
    """Environments beside the built-in ones."""
    pools: dict[Name, AnyPool] = {}
    """Work pools of Prefect, made by `tuneline deploy`."""
    pipelines: dict[Name, Pipeline] = Field(min_length=1)
    """Pipelines by name."""
