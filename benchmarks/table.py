"""Print the table of all benchmarks, and write it to docs/benchmarks.md. Each script appends its rows to a file.

    .venv/bin/python benchmarks/table.py ROWS.jsonl [--page docs/benchmarks.md]                                  (make bench)

A row is one figure of ours beside one of a peer or a limit, in the same unit, and the largest ratio wanted. Smaller is better.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

BEGIN, END = "<!-- the last `make bench` -->\n", "<!-- end -->\n"


def add_row(file: Path | None, name: str, ours: float, peer: str, theirs: float, unit: str, goal: float) -> None:
    """Append a row. `goal`: the largest acceptable ours / theirs. Does nothing without a file."""
    if file:
        row = {"name": name, "ours": ours, "peer": peer, "theirs": theirs, "unit": unit, "goal": goal}
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| what | ours | beside | theirs | ratio | goal | met |", "|---|---:|---|---:|---:|---:|---|"]
    for row in rows:
        ours, theirs, goal = (float(str(row[key])) for key in ("ours", "theirs", "goal"))
        ratio, unit = ours / theirs, row["unit"]
        met = "yes" if ratio <= goal else "**no**"
        lines.append(
            f"| {row['name']} | {figure(ours)} {unit} | {row['peer']} | {figure(theirs)} {unit} | {ratio:.2f} | {goal:g} | {met} |"
        )
    return "\n".join(lines) + "\n"


def figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> str:
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo() if line.startswith("model name")), platform.processor() or "unknown")
    vectors = next(
        (name for name in ("avx512f", "avx2") if any(line.startswith("flags") and name in line.split() for line in cpuinfo())), "no AVX2"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({model}, {vectors}), {memory:.0f} GiB of memory, Linux {platform.release().split('-')[0]}"


def cpuinfo() -> list[str]:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--page", type=Path, help="the page that keeps the table, between its two markers")
    arguments = parser.parse_args()
    text = table([json.loads(line) for line in arguments.rows.read_text(encoding="utf-8").splitlines()])
    print(text)
    if arguments.page:
        before, rest = arguments.page.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
        kept = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}:\n\n{text}"
        arguments.page.write_text(f"{before}{BEGIN}{kept}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
