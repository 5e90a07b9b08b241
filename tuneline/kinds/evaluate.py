"""The stage kind `evaluate`, and the rules for comparing its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.fields import ArtifactType, DatasetRef, ExternalPath, ModelOrAdapterRef, OnUnrendered
from tuneline.kinds.stage import ComputingStage, Stage
from tuneline.kinds.strategy import process_problems
from tuneline.wording import listed, nearest

# Fields that decide which questions are asked, and how.
DATASET_QUESTIONS = ("limit", "max_new_tokens", "stop")
BENCHMARK_QUESTIONS = ("limit", "num_fewshot", "include_path", "seed")
WITHOUT_ANSWERS = ("bits_per_byte", "preference_accuracy", "preference_accuracy_norm")  # metrics that need no generation
SCORES = ("exact_match", "answer_recall", "score", "stopped", *WITHOUT_ANSWERS)  # metrics of a dataset: tasks/evaluation/evaluate.py

HUMAN_EVAL = "human_eval"  # the only benchmark that lm-eval does not run


# Fields that have an effect only together with the named field.
ONLY_WITH = dict.fromkeys(("include_path", "num_fewshot", "apply_chat_template"), "benchmarks") | dict.fromkeys(
    ("max_new_tokens", "stop", "on_unrendered"), "datasets"
)


class EvaluateStage(ComputingStage):
    """Evaluate a model or an adapter on lm-eval benchmarks and on the test splits of datasets."""

    kind: Literal["evaluate"]
    also_called: ClassVar = ("test", "benchmark", "bench", "lmeval", "score")
    program: ClassVar = "tasks.evaluation.evaluate"
    libraries: ClassVar = ("torch", "transformers", "tokenizers", "peft", "lm-eval", "reasoning-gym", "datasets")
    imports: ClassVar = ("tasks.evaluation.harness", "transformers.modeling_layers")
    batches: ClassVar = True
    parallel: ClassVar = True
    hidden_files_in: ClassVar = frozenset({"include_path"})
    model: ModelOrAdapterRef
    """Model or adapter to evaluate."""
    datasets: tuple[DatasetRef, ...] = ()
    """Datasets whose test split is scored: exact match, answer recall, bits per byte, and of pairs the share whose chosen answer is more
    likely."""
    benchmarks: tuple[str, ...] = ()
    """Names of lm-eval tasks."""
    include_path: ExternalPath | None = None
    """Folder with your own lm-eval task files."""
    num_fewshot: int | None = Field(None, ge=0)
    """Number of few-shot examples per benchmark question; by default the benchmark's own."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of rows scored: the first of a benchmark, or evenly spaced rows of a dataset's test split."""
    apply_chat_template: bool = True
    """Render benchmark questions with the chat template. A dataset's conversations always are, as in training."""
    max_new_tokens: int = Field(256, ge=1)
    """Maximum length of an answer to a dataset's prompt, in tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer to a dataset's prompt, such as `["\\n"]`: it is cut before the first one that follows its thoughts, and
    counts as stopped. For models that have not learned to end an answer."""
    on_unrendered: OnUnrendered = "error"
    """How to handle rows of a dataset of which the chat template omits a part: `error` fails the stage, `drop` drops the row, `keep`
    scores the row as rendered."""
    allow_code_execution: bool = False
    """Allow benchmarks to run code that the model writes, in a sandbox. Required for `human_eval`."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What computes the answers: `transformers`, in one process per GPU, or `vllm`, a server in its own runtime that uses all of the
    stage's GPUs. vLLM suits many rows on GPUs, but rounds differently: compare only results of the same backend."""

    def output_type(self) -> ArtifactType:
        return "Report"

    def lm_eval_tasks(self) -> Iterator[tuple[str, str]]:
        yield from ((f"benchmarks.{i}", name) for i, name in enumerate(self.benchmarks) if name != HUMAN_EVAL)

    def own_lm_eval_tasks(self) -> str | None:
        return self.include_path

    def uses_engine(self) -> bool:
        return self.backend == "vllm"

    def runs_user_code(self) -> bool:
        return self.include_path is not None

    def world_size(self) -> int:
        """Return the processes that evaluate. With vLLM the GPUs belong to its server, whatever their number."""
        return 1 if self.uses_engine() else self.resources.world_size

    def micro_batch_size(self) -> int | None:
        """Return None with vLLM, which forms its own batches."""
        return None if self.uses_engine() else self.resources.micro_batch_size or 16

    def problems(self) -> Iterator[Problem]:
        engine = self.resources.engine
        if self.uses_engine() and engine is not None and engine.gpus not in (0, self.resources.gpus):
            found = f"found {engine.gpus}, expected {self.resources.gpus} (resources.gpus): vLLM uses all GPUs of an evaluation"
            yield Problem("resources.engine.gpus", found, "remove it")
        if self.uses_engine() and engine is not None:
            yield from engine.copies_problems(self.resources.gpus)
        if self.uses_engine() and (self.resources.processes or 1) > 1:
            hint = "remove it; `gpus` and `engine: {data_parallel: ...}` say how many GPUs compute at the same time"
            yield Problem("resources.processes", "found processes with `backend: vllm`, whose server has its own", hint)
        elif not self.uses_engine():
            yield from process_problems(self.resources, "an evaluation")
        if self.uses_engine() and self.resources.micro_batch_size is not None:
            hint = "remove it; `engine: {max_num_seqs: ...}` limits how many sequences vLLM processes at the same time"
            yield Problem("resources.micro_batch_size", "found micro_batch_size with `backend: vllm`, which forms its own batches", hint)
        if not self.datasets and not self.benchmarks:
            yield Problem("", "found neither datasets nor benchmarks, expected one or both", "add `datasets: [my-data]`")
        if HUMAN_EVAL in self.benchmarks and not self.allow_code_execution:
            hint = "set `allow_code_execution: true` to run the code that the model writes, in a sandbox"
            yield Problem(f"benchmarks.{self.benchmarks.index(HUMAN_EVAL)}", "found human_eval without allow_code_execution", hint)
        if self.allow_code_execution and HUMAN_EVAL not in self.benchmarks:
            found = "found allow_code_execution without human_eval, the only benchmark that runs code"
            yield Problem("allow_code_execution", found, "remove it")
        for owner in ("benchmarks", "datasets"):
            its = [field for field, of in ONLY_WITH.items() if of == owner and not getattr(self, owner)]
            given = [field for field in its if getattr(self, field) != type(self).model_fields[field].default]
            if given:
                effect, hint = ("it has", "remove it") if len(given) == 1 else ("they have", "remove them")
                yield Problem(given[0], f"found {', '.join(given)} without {owner}: {effect} no effect", hint)

    def upstream_problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        scored = stages.get(self.model)
        if scored and self.uses_engine() and (reason := scored.unserved(self)):
            yield Problem("model", f"found `{self.model}` with {reason}", "set `backend: transformers`")

    def held_out(self) -> Iterator[tuple[str, str, str]]:
        yield from ((f"datasets.{i}", name, "test") for i, name in enumerate(self.datasets))

    def metric_problem(self, name: str, metric: str, stages: Mapping[str, Stage]) -> tuple[str, str] | None:
        """Check metrics of datasets only: lm-eval alone knows the metrics of a benchmark."""
        subject, _, figure = metric.partition("/")
        if self.datasets and not self.benchmarks and subject not in self.datasets:
            return (
                f"found `{metric}`, but `{name}` scores only {listed(self.datasets)}",
                f"write `{self.datasets[0]}/exact_match`, for example",
            )
        if subject in self.datasets and (figure := figure.removesuffix("_stderr")) not in SCORES:
            hint = nearest(figure, SCORES) or f"write `{subject}/exact_match`, for example"
            return f"found `{metric}`, expected one of the metrics of a dataset: {listed(SCORES)}", hint
        return None

    def incomparable_fields(self, other: Stage, metric: str) -> list[str]:
        if not isinstance(other, EvaluateStage):
            return []
        subject, _, figure = metric.rpartition("/")
        fields: tuple[str, ...] = DATASET_QUESTIONS if subject in self.datasets else BENCHMARK_QUESTIONS
        unused = ("max_new_tokens", "stop") if figure in WITHOUT_ANSWERS else ()
        return [field for field in fields if field not in unused and getattr(self, field) != getattr(other, field)]
