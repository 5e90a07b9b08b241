"""The stage kind `export`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.fields import REVISION, ArtifactType, ModelOrAdapterRef, ReportRef, Repository
from tuneline.kinds.merge import SHARD
from tuneline.kinds.stage import ProgramStage, Stage


class ExportStage(ProgramStage):
    """Write a model or an adapter as a folder for transformers, PEFT and vLLM, with a model card, and optionally push it to the hub."""

    kind: Literal["export"]
    also_called: ClassVar = ("publish", "push", "upload", "release", "card")
    program: ClassVar = "tasks.convert.export"
    libraries: ClassVar = ("torch", "transformers", "tokenizers", "peft", "safetensors", "huggingface-hub")
    figures: ClassVar = ("bytes",)
    describes_history: ClassVar = True
    of: ModelOrAdapterRef
    """Model or adapter to export."""
    evaluations: tuple[ReportRef, ...] = ()
    """Evaluations whose metrics go into the model card. Those of other models, such as the base, are shown beside them."""
    merge: bool = False
    """Merge the adapter into its base while exporting, as the kind `merge` does."""
    adapter_only: bool = False
    """Leave out the base model of an adapter. By default it is exported too, into the folder `base/`, unless it comes from the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the exported weights; `auto` keeps them as they are."""
    max_shard_size: str = Field("5GB", pattern=SHARD)
    """Maximum size of a weight file that is written again, because of `merge` or `dtype`."""
    license: str | None = None
    """License of what is exported, by the hub's name, such as `apache-2.0`. By default the base model's, if that is known."""
    push: Repository | None = None
    """Model repository on the hub, `owner/name`, that gets the folder in one commit; created if missing. A cached stage does not push
    again. The token comes from HF_TOKEN."""
    revision: Annotated[str, Field(pattern=REVISION)] = "main"
    """Branch of the repository to push to; created if missing."""
    private: bool = True
    """Whether a repository that the push creates is private. A push to a public one needs `false`."""

    def output_type(self) -> ArtifactType:
        return "Report"

    def problems(self) -> Iterator[Problem]:
        if self.push is None:
            given = [name for name in ("revision", "private") if getattr(self, name) != type(self).model_fields[name].default]
            for name in given:
                yield Problem(name, f"found {name} without push: it has no effect", "remove it, or name the repository: `push: owner/name`")
        if self.adapter_only and self.merge:
            yield Problem("adapter_only", "found adapter_only with merge, which leaves no adapter", "remove one of them")
        if "max_shard_size" in self.model_fields_set and not self.merge and self.dtype == "auto":
            found = "found max_shard_size without merge or dtype: weights are copied as they are"
            yield Problem("max_shard_size", found, "remove it")

    def upstream_problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        for i, name in enumerate(self.evaluations):
            if name in stages and not isinstance(stages[name], EvaluateStage):
                yield Problem(f"evaluations.{i}", f"found `{name}`, which is not an evaluation", "name a stage of kind evaluate")
        exported = stages.get(self.of)
        if exported is None:
            return
        for name in ("merge", "adapter_only") if exported.output_type() == "Model" else ():
            if getattr(self, name):
                yield Problem(name, f"found {name}, but `{self.of}` gives a model, not an adapter", "remove it")
        if exported.quantized and self.dtype != "auto":
            found = f"found {self.dtype}, but the weights of `{self.of}` are quantized"
            yield Problem("dtype", found, "remove it, or export the model that it was quantized from")
