"""Replace parts of libraries. docs/patches.md lists each place, its reason, and the version that makes it unnecessary."""

from __future__ import annotations


def patch(owner: object, name: str, value: object) -> None:
    """Set an attribute of a library's module, class or object. Raises RuntimeError if it does not exist: another release may have
    renamed it, and would run unpatched."""
    if not hasattr(owner, name):
        where = getattr(owner, "__name__", type(owner).__name__)
        raise RuntimeError(f"found no `{name}` in {where} to replace: the library's version is not the one that docs/patches.md describes")
    setattr(owner, name, value)
