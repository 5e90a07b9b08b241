"""Keep secrets of the process environment (HF_TOKEN and the like) out of what tuneline writes and shows.

Secrets are recognized only by the names of their variables. A token written into pipelines.yaml is rejected when the file is read,
because it would be in keys, manifests and Prefect's parameters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tuneline.files import write_atomically

NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
NO_SECRETS = frozenset({"TOKENIZERS_PARALLELISM"})
SHORTEST = 8  # characters; shorter values could be ordinary words
MASK = b"***"
FROM_ENVIRONMENT = "remove it, and set the token in the environment of the process, for example as HF_TOKEN"
# Token formats of Hugging Face, GitHub, OpenAI and similar services, and AWS.
TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|sk-[A-Za-z0-9_-]{30,}|AKIA[A-Z0-9]{16})\b")


def masked(text: bytes) -> bytes:
    """Return the text with the values of secrets masked."""
    for value in _values():
        text = text.replace(value, MASK)
    return text


def mask_file(path: Path) -> None:
    """Mask secrets in a file. Files without secrets are not rewritten."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    if (clean := masked(content)) != content:
        write_atomically(path, clean)


def named_in(text: str, environment: Mapping[str, str]) -> str | None:
    """Return the name of a variable whose secret value is in the text."""
    return next((name for name, value in _of(environment) if value in text), None)


def _values() -> list[bytes]:
    return [os.fsencode(value) for _, value in _of(os.environ)]


def _of(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return names and values of secrets, longest value first: one may be part of another."""
    found = [(name, value) for name, value in environment.items() if NAMES.search(name) and name not in NO_SECRETS]
    return sorted(((name, value) for name, value in found if len(value) >= SHORTEST), key=lambda pair: -len(pair[1]))
