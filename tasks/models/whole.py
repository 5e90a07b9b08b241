"""Finds modules that are trained whole beside an adapter."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from tuneline.errors import StageFailed
from tuneline.kinds.adapters import Places, matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def saved_modules(model: PreTrainedModel, adapted: set[str], places: Places) -> tuple[tuple[str, ...], str]:
    """Return the modules of `modules_to_save` by their full names, and the head if it is tied to one of them. Raises
    StageFailed(config) for unknown ones, for those that hold a layer with an adapter, and for a tied head alone."""
    known = {name for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
    found: set[str] = set()
    for given in places.modules_to_save or ():
        matched = {name for name in known if matches(name, (given,))}
        if not matched:
            near = difflib.get_close_matches(given, leaves(known), 3)
            message = f"{places.kind}.modules_to_save: found {given}, expected the name of a module of this base model"
            raise StageFailed(
                "config", message, f"did you mean {', '.join(near)}?" if near else f"for example {', '.join(sorted(known)[:3])}"
            )
        found |= matched
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = names[id(model.get_input_embeddings())], names.get(id(model.get_output_embeddings()))
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and head in found:
        if embedding not in found:
            message = f"{places.kind}.modules_to_save: found {head}, which is one tied weight with {embedding}"
            raise StageFailed("config", message, f"write {embedding.rpartition('.')[2]}, which trains both")
        found.remove(head)
    for name in sorted(found):
        if inside := sorted(each for each in adapted if f"{each}.".startswith(f"{name}.")):
            message = f"{places.kind}.modules_to_save: found {name}, of which {inside[0]} also gets an adapter"
            raise StageFailed("config", message, f"set `exclude_modules: [{', '.join(leaves(set(inside)))}]`")
    return tuple(sorted(found)), head or "" if tied and embedding in found else ""


def leaves(names: set[str] | frozenset[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})
