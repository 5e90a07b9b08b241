"""The stage kind `quantize`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from tuneline.kinds.fields import ArtifactType, DatasetRef, FullPrecisionRef, Name
from tuneline.kinds.stage import ComputingStage


class QuantizeStage(ComputingStage):
    """Quantize a model's weights with GPTQ (arXiv:2210.17323), by gptqmodel, in the runtime `quantize`.

    An evaluation dequantizes the weights, on GPUs and on CPUs, and needs the memory of the unquantized model. With `backend: vllm` it
    computes with packed weights.
    """

    kind: Literal["quantize"]
    program: ClassVar = "tasks.convert.quantize"
    libraries: ClassVar = ("torch", "transformers", "tokenizers", "safetensors", "gptqmodel")
    imports: ClassVar = ("transformers.modeling_layers",)
    figures: ClassVar = ("perplexity_before", "perplexity", "size_ratio")
    runtime: Name = "quantize"
    method: Literal["gptq"] = "gptq"
    """Quantization method."""
    role: ClassVar = "quantized"
    also_called: ClassVar = ("gptq", "awq", "gguf", "int4", "int8", "autogptq", "compress")
    quantized: ClassVar = True
    model: FullPrecisionRef
    """Model to quantize, in full precision."""
    calibration: DatasetRef
    """Dataset for calibration: its train split, rendered as in training. Its test split measures perplexity."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits per weight."""
    group_size: Literal[-1, 16, 32, 64, 128, 256] = 128
    """Number of weights that share a scale; must divide the model's width. Smaller groups are more accurate and larger on disk."""
    desc_act: bool = False
    """Quantize columns in order of decreasing activation: more accurate, but slower to serve."""
    sym: bool = True
    """Quantize symmetrically around zero."""
    samples: int = Field(128, ge=1)
    """Number of calibration rows, sampled with the stage's seed."""
    max_length: int = Field(2048, ge=8)
    """Maximum length of a calibration row, in tokens; longer rows are truncated."""
    max_perplexity_ratio: float = Field(1.5, gt=1)
    """Fail the stage if perplexity rises by more than this factor."""

    def output_type(self) -> ArtifactType:
        return "Model"

    def packages(self) -> frozenset[str]:
        return super().packages() | {"gptqmodel"}

    def made_from(self) -> str | None:
        return self.model

    def held_out(self) -> Iterator[tuple[str, str, str]]:
        yield "calibration", self.calibration, "test"

    def unserved(self, by: ComputingStage) -> str | None:
        """Check the limits of vllm/model_executor/layers/quantization/auto_gptq.py."""
        if not by.resources.gpus:
            return "GPTQ and no GPU: vLLM computes GPTQ only in half precision, but evaluations on a CPU use float32"
        if by.compute_type() == "float32":
            return "GPTQ in float32: vLLM computes GPTQ only in half precision"
        if self.bits not in (4, 8) or not self.sym:
            return f"bits {self.bits} and sym {str(self.sym).lower()}, but vLLM supports only symmetric 4 or 8 bits"
        return None
