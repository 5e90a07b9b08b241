"""The stage kind `model`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from tuneline.errors import Problem
from tuneline.kinds.fields import ArtifactType, ExternalPath, Repository, Revision
from tuneline.kinds.stage import ProgramStage

# Arguments that every rendering of a chat template sets: the rows decide them.
RENDERED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "additional_special_tokens")


class ModelStage(ProgramStage):
    """Fetch a base model, pin its version and check it."""

    kind: Literal["model"]
    also_called: ClassVar = ("base", "hub", "download", "fetch", "llm", "checkpoint")
    program: ClassVar = "tasks.models.fetch"
    libraries: ClassVar = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "huggingface-hub")
    imports: ClassVar = ("transformers.modeling_layers",)  # imports what all models need
    figures: ClassVar = ("parameters",)
    role: ClassVar = "base"
    hub: Repository | None = None
    """Model repository on the hub, `owner/name`."""
    revision: Revision = "main"
    """Branch, tag or commit of the hub repository; the commit it resolves to is in the cache key."""
    path: ExternalPath | None = None
    """Local model folder; referenced, not copied."""
    gguf: ExternalPath | None = None
    """Local GGUF file; converted to safetensors in float32."""
    chat_template: ExternalPath | None = None
    """File with a chat template (Jinja) that replaces the model's own, or gives one to a base model that has none. Saved with every
    model and adapter made from it."""
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """Values for arguments of the chat template, such as `{enable_thinking: false}`. They become defaults in the saved template, so
    that training, evaluation and servers render the same without passing them."""
    trust_remote_code: bool = False
    """Run Python files that come with the model, in this and every later stage. Enable it only for sources that you trust."""

    def output_type(self) -> ArtifactType:
        return "Model"

    def repositories(self) -> Iterator[tuple[str, str, str, str]]:
        if self.hub:
            yield "hub", "model", self.hub, self.revision

    def runs_user_code(self) -> bool:
        return self.trust_remote_code

    def problems(self) -> Iterator[Problem]:
        given = [name for name in ("hub", "path", "gguf") if getattr(self, name) is not None]
        if len(given) != 1:
            yield Problem("", f"found {' and '.join(given) or 'no source'}, expected exactly one of hub, path, gguf")
        if self.hub is None and self.revision != "main":
            yield Problem("revision", "found a revision without hub", "only hub repositories have revisions")
        if self.trust_remote_code and self.gguf is not None:
            yield Problem("trust_remote_code", "found trust_remote_code with gguf, which holds no code", "remove it")

        for name, value in self.chat_template_kwargs.items():
            place = f"chat_template_kwargs.{name}"
            if not name.isidentifier() or not name.isascii():
                yield Problem(place, f"found `{name}`, expected the name of an argument: letters, digits and underscores")
            elif name in (*RENDERED, *SPECIAL):
                yield Problem(place, f"found `{name}`, which every rendering sets itself", "remove it")
            elif value in ("true", "false"):
                found = f"found the text '{value}', which templates take for true, expected true or false"
                yield Problem(place, found, "remove the quotes")

    def warnings(self) -> Iterator[Problem]:
        if self.trust_remote_code:
            yield Problem("trust_remote_code", "runs Python files that come with this model")
