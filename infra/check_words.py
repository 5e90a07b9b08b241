"""Find words that docs/style.md replaces, in prose, messages, docstrings and comments: part of `make lint`.

    python infra/check_words.py            list each place, exit status 1 if there is one
    python infra/check_words.py --count    print the number of each word

The list is the table of docs/style.md. Only files under version control are read.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STYLE = ROOT / "docs" / "style.md"
EXEMPT = {"docs/style.md", "docs/log.md", "infra/demo/make_bookings.py"}  # the list, history, and rows of a dataset
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".j2", ".sh", ".slurm", ".html", ""}


def forbidden() -> list[str]:
    """Read the left column of the table."""
    rows = re.findall(r"^\| (`.+?) \|", STYLE.read_text(encoding="utf-8"), re.MULTILINE)
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row)]


def places() -> list[tuple[str, int, str, str]]:
    """Return (file, line, word, text of the line) for each word found."""
    pattern = re.compile(r"\b(" + "|".join(re.escape(word) for word in forbidden()) + r")\b", re.IGNORECASE)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [name for name in listed.split("\0") if name and name not in EXEMPT and Path(name).suffix in TEXT]
    return [
        (name, number, match[1].lower(), line.strip())
        for name in files
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        for match in pattern.finditer(line)
    ]


def main() -> None:
    found = places()
    if "--count" in sys.argv:
        for word, times in Counter(word for _, _, word, _ in found).most_common():
            print(f"{times:5}  {word}")
        print(f"{len(found):5}  in all")
        return
    for name, number, word, line in found:
        print(f"{name}:{number}: found `{word}`, expected plain English (docs/style.md): {line[:120]}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
