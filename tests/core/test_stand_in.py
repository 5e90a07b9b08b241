"""The stand-in program of the flow tests reads and writes the same files as real programs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from project import Project, place_stand_in

from tuneline.workspace.protocol import Event, Failure, Input, Message, Request, Result


def as_json(message: Message) -> Any:
    return json.loads(message.model_dump_json(by_alias=True, exclude_unset=True)) | {"schema": message.schema_number}


@pytest.mark.parametrize(
    ("action", "file", "message"),
    [
        ("ok", "result", Result(metrics={"figure": 1.0})),
        (0.25, "result", Result(metrics={"figure": 0.25})),
        ("blab", "result", Result(metrics={"figure": 1.0}, info={"source": "token"})),
        ("oom", "failure", Failure(failure_class="oom", message="planted oom", hint="none")),
        ("blab and fail", "failure", Failure(failure_class="bug", message="401 for token", hint="renew token", details="token")),
    ],
)
def test_it_speaks_the_protocol(project: Project, monkeypatch: pytest.MonkeyPatch, action: Any, file: str, message: Message) -> None:
    monkeypatch.setenv("HF_TOKEN", "token")
    place_stand_in(project)(one=[action])
    work = project.root / ".tuneline" / "work" / "key"
    work.mkdir(parents=True)
    Request(
        kind="dataset", key="0" * 64, config={}, seed=0, inputs={"model": Input(path=Path("/m"), digest="d", type="Model")},
        files={"sources.0.path": [project.root / "one.txt"]}, commits={}, out=project.root / "out", work=work, attempt=1,
        resources={"micro_batch_size": 4},
    ).write(work / "request.json")  # fmt: skip
    command = [project.root / "bin" / "python", "-m", "tasks", work / "request.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (file == "failure"), done.stderr
    assert json.loads((work / f"{file}.json").read_bytes()) == as_json(message)
    assert type(message).read(work / f"{file}.json") == message
    events = [Event.model_validate_json(line) for line in (work / "events.jsonl").read_text().splitlines()]
    assert (events[0].type, events[0].step, events[0].total, events[0].message) == ("progress", 1, 2, "half")
    if file == "result":
        assert (project.root / "out" / "payload" / "data.json").exists()


def test_it_answers_for_its_versions_as_a_python_does(project: Project) -> None:
    from tuneline.workspace.runtimes import RuntimeEnvironment

    place_stand_in(project)
    assert RuntimeEnvironment("stand-in", project.root / "bin" / "python").versions(["pydantic", "torch"]) == {
        "pydantic": "2.12.0",
        "torch": "absent",
    }
