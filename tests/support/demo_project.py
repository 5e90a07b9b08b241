"""The pipeline of stand-ins that most flow tests run."""

from __future__ import annotations

from tuneline.workspace.runs import RunRecord

PIPELINES = """\
version: 1
runtimes: {stand-in: {python: bin/python}}
pipelines:
  demo:
    parallel: 2
    stages:
      one:   {kind: dataset, runtime: stand-in, sources: [{type: files, path: one.txt}]}
      two:   {kind: dataset, runtime: stand-in, sources: [{type: files, path: two.txt}], needs: [one]}
      other: {kind: dataset, runtime: stand-in, sources: [{type: files, path: other.txt}], timeout: 60}
      gate:  {kind: gate, require: [{metric: figure, of: two, at_least: 0.5}]}
      after: {kind: dataset, runtime: stand-in, sources: [{type: files, path: after.txt}], needs: [gate]}
"""


def statuses(record: RunRecord) -> dict[str, str]:
    return {stage.stage: stage.status for stage in record.stages}
