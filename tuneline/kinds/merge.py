"""The stage kind `merge`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tuneline.kinds.fields import AdapterRef, ArtifactType
from tuneline.kinds.stage import ProgramStage

SHARD = r"^(0\.\d*[1-9]\d*|[1-9]\d*(\.\d+)?)(MB|GB)$"


class MergeStage(ProgramStage):
    """Merge an adapter into its base model, shard by shard."""

    kind: Literal["merge"]
    also_called: ClassVar = ("mergelora", "mergeadapter", "fuse")
    program: ClassVar = "tasks.convert.merge"
    libraries: ClassVar = ("torch", "transformers", "tokenizers", "peft", "safetensors", "huggingface-hub")
    imports: ClassVar = ("peft",)
    figures: ClassVar = ("max_logit_difference",)
    role: ClassVar = "merged"
    adapters: tuple[AdapterRef, ...] = Field(min_length=1, max_length=1)
    """Adapter to merge; its base model is found automatically."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the merged weights; `auto` keeps the base model's."""
    max_shard_size: str = Field("5GB", pattern=SHARD)
    """Maximum size of a weight file."""

    def output_type(self) -> ArtifactType:
        return "Model"

    def made_from(self) -> str | None:
        return self.adapters[0]
