"""pipelines.yaml as types: the whole file format, one model a stage kind.

A field's description says its effect. `Reference` marks a field that names another stage; `OutsideFile` one that names a
file or folder beside pipelines.yaml. Everything in `Stage` (the base class) only changes how a stage runs and is never in
its key; everything a kind adds changes the result and is. Checks that need more than one field are `findings()`; those that
need more than one stage are in `tuneline.config.checks`. What all stages have is in `tuneline.kinds.stage`, trainings are in
`tuneline.kinds.training`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from tuneline.config.pools import INTERVAL, AnyPool, Schedule
from tuneline.kinds.fields import (
    AdapterRef,
    ArtifactType,
    DatasetRef,
    Finding,
    ModelOrAdapterRef,
    ModelRef,
    Name,
    OnUnrendered,
    Path,
    Repository,
    Revision,
    StageRef,
    Strict,
)
from tuneline.kinds.sources import CodeSource, Source
from tuneline.kinds.stage import ComputingStage, ProgramStage, Stage
from tuneline.kinds.training import GrpoStage, SftStage

SHARD = r"^(0\.\d*[1-9]\d*|[1-9]\d*(\.\d+)?)(MB|GB)$"
Share = Annotated[float, Field(ge=0, lt=1)]


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

    def gives(self) -> ArtifactType:
        return "Model"

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
    dedup: Literal["content", "prompt", "none"] = "content"
    """Which rows are duplicates, of which the first is kept: those that say and ask the same, `answer`, `tests`, `extra` and `tools` with
    it; those of one prompt, whatever the answer; or no rows."""
    special_tokens: Literal["error", "escape", "keep"] = "error"
    """What happens to a row whose text holds a special token of the model, as `<|im_end|>`: it counts as a bad row; a space is written
    into the token, so that it is text; or it stays, and is the real token, as in text that is rendered already."""
    split: Split = Split()
    """Shares held out."""
    max_length: int | None = Field(None, ge=8)
    """Tokens a rendered row may have."""
    over_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a row over max_length; only plain text can be truncated. Counted in the report."""
    on_unrendered: OnUnrendered = "error"
    """What happens to a conversation of which the model's chat template leaves something out, as calls or a system prompt."""

    def gives(self) -> ArtifactType:
        return "Dataset"

    def findings(self) -> Iterator[Finding]:
        if self.on_unrendered != "error" and self.model is None:
            yield Finding("on_unrendered", "found on_unrendered without model", "name the model whose template renders: `model: base`")
        if self.max_length is not None and self.model is None:
            yield Finding("max_length", "found max_length without model", "name the model whose tokenizer counts: `model: base`")
        if self.special_tokens != "error" and self.model is None:
            yield Finding("special_tokens", "found special_tokens without model", "name the model whose tokens they are: `model: base`")
        if self.over_long != "drop" and self.max_length is None:
            yield Finding("over_long", "found over_long without max_length", "remove it, or set max_length")
        for i, source in enumerate(self.sources):
            if isinstance(source, CodeSource) and self.model is None:
                hint = "name the model whose tokenizer cuts the chunks: `model: base`"
                yield Finding(f"sources.{i}", "found source code without model", hint)
            if isinstance(source, CodeSource) and self.max_length is not None and source.chunk_length > self.max_length:
                message = f"found {source.chunk_length}, allowed at most max_length, {self.max_length}"
                yield Finding(f"sources.{i}.chunk_length", message, "a longer chunk would be dropped or cut as every row is")
        if self.split.validation + self.split.test >= 1:
            yield Finding("split", f"found {self.split.validation} + {self.split.test}, allowed a sum below 1")


# --- evaluate ---------------------------------------------------------------------------------------------------------


HUMAN_EVAL = "human_eval"  # the one benchmark that is not lm-eval's own
# Fields without effect, unless the field is given that they are for.
OF_EVALUATIONS = dict.fromkeys(("include_path", "num_fewshot", "apply_chat_template"), "benchmarks") | dict.fromkeys(
    ("max_new_tokens", "on_unrendered"), "datasets"
)


class EvaluateStage(ComputingStage):
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
    on_unrendered: OnUnrendered = "error"
    """What happens to a dataset's row of whose prompt or answer the chat template leaves something out: it is refused, left out, or asked
    as it is rendered."""
    allow_code_execution: bool = False
    """Lets a benchmark run the code that the model writes, in a sandbox: `human_eval` needs it."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What computes: the model itself, or vLLM, a server in a runtime of its own that gets all of the stage's GPUs.
    It is meant for many rows on GPUs, and rounds otherwise: compare figures of one backend."""

    def gives(self) -> ArtifactType:
        return "Report"

    def uses_engine(self) -> bool:
        return self.backend == "vllm"

    def world_size(self) -> int:
        """One: with vLLM the GPUs are its server's, however many there are."""
        return self.resources.processes or 1 if self.uses_engine() else self.resources.world_size

    def micro_batch_size(self) -> int | None:
        """vLLM makes its batches by itself."""
        return None if self.uses_engine() else self.resources.micro_batch_size or 16

    def findings(self) -> Iterator[Finding]:
        engine = self.resources.engine
        if self.uses_engine() and engine is not None and engine.gpus not in (0, self.resources.gpus):
            found = f"found {engine.gpus}, allowed resources.gpus, {self.resources.gpus}: all of them are the engine's"
            yield Finding("resources.engine.gpus", found, "leave it out")
        if self.uses_engine() and self.resources.micro_batch_size is not None:
            hint = "`engine: {max_num_seqs: ...}` says how many sequences vLLM works on at the same time"
            yield Finding("resources.micro_batch_size", "found a micro_batch_size, which vLLM does not have", hint)
        if not self.datasets and not self.benchmarks:
            yield Finding("", "found neither datasets nor benchmarks, allowed one or both", "add `datasets: [my-data]`")
        if HUMAN_EVAL in self.benchmarks and not self.allow_code_execution:
            hint = "set `allow_code_execution: true`: it runs what the model writes, in a sandbox"
            yield Finding(f"benchmarks.{self.benchmarks.index(HUMAN_EVAL)}", "found human_eval without allow_code_execution", hint)
        if self.allow_code_execution and HUMAN_EVAL not in self.benchmarks:
            found = "found allow_code_execution without human_eval, the only benchmark that runs code"
            yield Finding("allow_code_execution", found, "remove it")
        for owner in ("benchmarks", "datasets"):
            its = [field for field, of in OF_EVALUATIONS.items() if of == owner and not getattr(self, owner)]
            given = [field for field in its if getattr(self, field) != type(self).model_fields[field].default]
            if given:
                which, hint = ("it is", "remove it") if len(given) == 1 else ("they are", "remove them")
                yield Finding(given[0], f"found {', '.join(given)} without {owner}, which alone {which} for", hint)


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

    def gives(self) -> ArtifactType:
        return "Model"


class QuantizeStage(ComputingStage):
    """Weights of fewer bits by GPTQ (arXiv:2210.17323), through gptqmodel, in the runtime `quantize`.

    An evaluation decodes them, on GPUs as on CPUs, and takes the memory of the unquantized model; with `backend: vllm` it computes with
    packed weights.
    """

    kind: Literal["quantize"]
    runtime: Name = "quantize"
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

    def gives(self) -> ArtifactType:
        return "Model"


# --- gate -------------------------------------------------------------------------------------------------------------


class Requirement(Strict):
    """A condition on one metric: at_least, at_most, improves_on (by), or not_below (tolerance).

    Two evaluations are compared only if they ask the same: with other limits, few-shot examples, seeds, task files (benchmarks) or
    lengths of answers (datasets) the file is refused. Another backend, compute type or use of the chat template is told beside the verdict.
    """

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

    @property
    def compared_with(self) -> str | None:
        """The stage whose same metric it is held against."""
        return self.improves_on or self.not_below


class GateStage(Stage):
    """Lets the pipeline pass only if every requirement holds. Never cached."""

    kind: Literal["gate"]
    require: tuple[Requirement, ...] = Field(min_length=1)
    """All of them must hold."""

    def gives(self) -> ArtifactType:
        return "Verdict"

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
    ModelStage | DatasetStage | SftStage | GrpoStage | EvaluateStage | MergeStage | QuantizeStage | GateStage, Field(discriminator="kind")
]
STAGES: dict[str, type[Stage]] = {
    "model": ModelStage,
    "dataset": DatasetStage,
    "sft": SftStage,
    "grpo": GrpoStage,
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
    concurrency: int = Field(1, ge=1)
    """Runs of its deployment that may work at the same time; further ones wait."""
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
    history: Annotated[str, Field(pattern=INTERVAL)] = "90d"
    """How long runs that have ended are kept: by servers that tuneline starts, and as records by `tuneline gc`: `12h`, `30d`."""
    vars: dict[str, bool | int | float | str] = {}
    """Values for `${name}` anywhere in the file."""
    runtimes: dict[Name, Runtime] = {}
    """Environments beside the built-in ones."""
    pools: dict[Name, AnyPool] = {}
    """Work pools of Prefect, made by `tuneline deploy`."""
    pipelines: dict[Name, Pipeline] = Field(min_length=1)
    """Pipelines by name."""
