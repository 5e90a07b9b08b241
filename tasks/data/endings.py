"""Configures where a saved model stops: at the tokens that end a rendered answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.data.rendering import ends
from tasks.models.loading import saved_config, write_json
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Events

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_configs(folder: Path, payload: Path, dtype: str | None, tokenizer: PreTrainedTokenizerBase, events: Events) -> None:
    """Write the base's config.json and generation_config.json with the weights' new dtype, and with the tokens that end a trained
    answer in addition to the previous ones: `generate` must stop where an evaluation stops."""
    for name in ("config.json", "generation_config.json"):
        if not (folder / name).exists():
            continue
        document = json.loads((folder / name).read_text(encoding="utf-8"))
        if name == "config.json":
            document = saved_config(document, dtype)
        before, trained = document.get("eos_token_id"), ends(tokenizer)
        if not set(trained) <= set(before if isinstance(before, list) else [before]):
            every = ends(tokenizer, before)
            document["eos_token_id"] = every if len(every) > 1 else every[0]
            events.warning(f"{name}: eos_token_id was {before} and is now {document['eos_token_id']}: {trained} end the trained answers")
        write_json(payload / name, document)


def check_ends(payload: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises StageFailed(bug) unless transformers' `generate`, with its defaults, stops where an evaluation stops."""
    from transformers import GenerationConfig

    name = "generation_config.json" if (payload / "generation_config.json").exists() else "config.json"
    found = GenerationConfig.from_pretrained(payload, config_file_name=name).eos_token_id
    if lost := sorted(set(ends(tokenizer)) - set(found if isinstance(found, list) else [found])):
        raise StageFailed("bug", f"{name}: found no end of an answer at {', '.join(tokenizer.convert_ids_to_tokens(lost))}, expected one")
