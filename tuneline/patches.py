"""Replacing a part of a library. docs/patches.md lists each place where we do, its cause, and the version that would end it."""

from __future__ import annotations


def patch(owner: object, name: str, value: object) -> None:
    """Sets an attribute of a library's module, class or object. Raises RuntimeError where there is none of that name: another release may
    have renamed it, and would go on unchanged."""
    if not hasattr(owner, name):
        where = getattr(owner, "__name__", type(owner).__name__)
        raise RuntimeError(f"found no `{name}` in {where} to replace: the library's version is not the one that docs/patches.md describes")
    setattr(owner, name, value)
