"""Print one stage for `tuneline show PIPELINE/STAGE`. `--json` prints the manifest, with digests and versions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from flows.report.format import duration, number, utc_time, with_error
from flows.report.html import warnings
from flows.report.stage import Stage
from tuneline.disk import human
from tuneline.workspace.file_names import LOG, META, PAYLOAD, REPORT_TEXT


def print_stage(stage: Stage) -> None:
    """Print facts by name, then the program's report. Not a table, so that paths and messages are not wrapped."""
    facts = list(_facts(stage))
    width = max(len(name) for name, _ in facts)
    before = ""
    for name, value in facts:
        print(f"{name if name != before else '':<{width}}  {value}".rstrip())
        before = name
    if report := stage.text(REPORT_TEXT):
        print(f"\n{report}")


def _facts(stage: Stage) -> Iterator[tuple[str, str]]:
    yield "stage", stage.name
    yield "kind", stage.kind
    yield "status", stage.status
    for line in stage.message.splitlines():
        yield "message", line
    if stage.entry and stage.entry.key:
        yield "key", stage.entry.key
    if stage.manifest:
        yield "made", utc_time(stage.manifest.host.get("finished"))
    if stage.seconds:
        yield "took", f"{duration(stage.seconds)}{', when it was built' if stage.status == 'cached' else ''}"
    if stage.attempts:
        yield "attempts", stage.attempts
    for named in dict.fromkeys(f"{field.partition('.')[0]}: {other}" for field, other in stage.plan.names.items()):
        yield "inputs", named
    for name, value in stage.metrics.items():
        if not name.endswith("_stderr"):
            error = stage.metrics.get(f"{name}_stderr")
            yield "metrics", with_error(f"{name} {number(value)}", error)
    if stage.entry and stage.entry.artifact:
        payload, log = (os.path.relpath(Path(stage.entry.artifact, name)) for name in (PAYLOAD, f"{META}/{LOG}"))
        yield "payload", f"{payload}  ({stage.gone or human(stage.size)})"
        if stage.manifest:
            yield "log", log
    for tracker, link in (stage.manifest.info.get("trackers", {}) if stage.manifest else {}).items():
        yield "trackers", f"{tracker}: {link}"
    for message in warnings(stage):
        yield "warnings", message
