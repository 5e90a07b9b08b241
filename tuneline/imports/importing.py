"""Import what other tools run: `import_sources` reads files or a command and returns a pipeline.

    files or a command -> jobs (reading.py) -> one translation each (a module a tool) -> a draft (compose.py) -> text

Nothing is dropped silently: a key of a source is a field of a stage or a comment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tuneline.errors import ConfigError, Problem
from tuneline.imports import (
    axolotl,
    axolotl_keys,
    llamafactory,
    llamafactory_keys,
    roll,
    roll_keys,
    scripts,
    swift,
    swift_keys,
    verl,
    verl_keys,
)
from tuneline.imports.compose import Draft, pipeline_name, settle
from tuneline.imports.fates import Table
from tuneline.imports.reading import read_jobs
from tuneline.imports.translation import Job, Translation

TOOLS: dict[str, Callable[[Job, dict[str, str]], Translation]] = {
    "LLaMA-Factory": llamafactory.translate,
    "ms-swift": swift.translate,
    "verl": verl.translate,
    "ROLL": roll.translate,
    "axolotl": axolotl.translate,
    "TRL": scripts.translate,
    "the script": scripts.translate,
}
TABLES: dict[str, Table] = {
    "LLaMA-Factory": llamafactory_keys.TABLE,
    "ms-swift": swift_keys.TABLE,
    "verl": verl_keys.TABLE,
    "ROLL": roll_keys.TABLE,
    "axolotl": axolotl_keys.TABLE,
    "TRL": scripts.TABLE,
}


def import_sources(sources: Sequence[str], target: Path, name: str = "") -> Draft:
    """Translate files, or one command, to a pipeline. `target`: the folder of the result, which its relative paths start at.

    Raises ConfigError for a source that cannot be read, a tool that is unknown, and a training that tuneline lacks.
    """
    jobs = read_jobs(sources, target)
    draft = Draft(pipeline_name(name or Path(jobs[0].name).stem))
    tools = dict.fromkeys(job.tool for job in jobs)
    draft.remarks.append(f"From {', '.join(dict.fromkeys(job.name for job in jobs))} ({', '.join(tools)}), by `tuneline import`.")
    for job in jobs:
        if any(not key.isprintable() for key in job.given):
            raise ConfigError([Problem("", "found a key with a control character", "remove it", place=job.name)])
        translation = TOOLS[job.tool](job, draft.outputs)
        translation.close()
        draft.add(translation, len({each.name for each in jobs}) > 1)
    settle(draft, target)
    return draft
