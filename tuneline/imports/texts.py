"""Reads text files, and words the errors about sources."""

from __future__ import annotations

from pathlib import Path

from tuneline.errors import ConfigError, Problem

EXPECTED = "a YAML file of LLaMA-Factory, axolotl or ROLL, or a command or script of ms-swift, verl or your own"
HINT = "docs/importing.md lists what `tuneline import` reads"
MAX_SCRIPT = 1_000_000


def wrong(place: str, message: str, hint: str) -> ConfigError:
    return ConfigError([Problem("", message, hint, place=place)])


def read_text(file: Path) -> str:
    """Read a script. Raises ConfigError for a folder, a file that is no text, and one above 1 MB."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_SCRIPT + 1)
        text = data.decode("utf-8-sig")
    except IsADirectoryError:
        raise wrong(str(file), "found a folder, expected a file", "name the file in it") from None
    except OSError as error:
        raise wrong(str(file), f"the file cannot be read: {error.strerror}", "check its permissions") from None
    except UnicodeDecodeError:
        raise wrong(str(file), f"found bytes that are not UTF-8, expected {EXPECTED}", HINT) from None
    if len(data) > MAX_SCRIPT:
        raise wrong(str(file), "found more than 1 MB, expected a script", HINT)
    return text
