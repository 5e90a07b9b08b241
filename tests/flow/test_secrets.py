"""Secrets: a program writes its token to every output, and the tests look for it in every file and on the server."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from demo_project import statuses
from project import Project

from tuneline.config.load import load
from tuneline.errors import ConfigError
from tuneline.secrets import masked

TOKEN = "hf_" + "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3z"


def files_with(folder: Path, secret: str) -> list[Path]:
    """Return the files that hold the secret: plain, escaped, or compressed."""
    needles = {secret.encode(), json.dumps(secret)[1:-1].encode()}
    found, seen = [], 0
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "script.json":
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            seen += 1
            if any(needle in content for needle in needles):
                found.append(path)
    assert seen > 20, "nothing was looked at"
    return found


def test_a_token_is_found_nowhere(
    demo: Project,
    stand_in: Callable[..., None],
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter, LogFilterFlowRunId
    from prefect.logging.handlers import APILogHandler

    from flows.report.html import report_of
    from tuneline.workspace.workspace import Workspace

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    stand_in(one=["blab"], other=["blab and fail"])
    record, states = run()
    assert statuses(record)["one"] == "done"
    assert statuses(record)["other"] == "failed"
    APILogHandler().flush()
    report_of(Workspace(load(demo.root / "pipelines.yaml")).runs, record)
    with get_client(sync_client=True) as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[states["id"]])))
        flow_run = client.read_flow_run(states["id"])
        artifacts = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[states["id"]])))
        server = [entry.message for entry in logs] + [entry.model_dump_json() for entry in (flow_run, *artifacts)]
    assert not [line for line in server if TOKEN in line]
    assert files_with(demo.root, TOKEN) == []
    shown = capfd.readouterr()
    assert TOKEN not in shown.out + shown.err
    # The token was written, and the rest of the text is still there:
    folder = Path(record.stages[0].artifact or "")
    assert "cannot reach https://user:***@hub" in (folder / "meta" / "log.txt").read_text()
    assert "the token *** is old" in (folder / "meta" / "events.jsonl").read_text()
    assert json.loads((folder / "manifest.json").read_text())["info"] == {"source": "***"}
    failed = next(stage for stage in record.stages if stage.stage == "other")
    assert failed.message == "bug: 401 for ***\n\nhint: renew ***\n***"
    assert any("cannot reach https://user:***@hub" in line for line in server)
    shown_in_prefect = {artifact.key: str(artifact.data) for artifact in artifacts}
    assert "- `the token *** is old`" in shown_in_prefect["stage-demo-one"]
    for line in ("### Failed: bug\n\n```text\n401 for ***\n```", "**hint:** `renew ***`", "cannot reach https://user:***@hub"):
        assert line in shown_in_prefect["stage-demo-other"]


@pytest.mark.slow
def test_the_command_line_shows_none_either(demo: Project, stand_in: Callable[..., None]) -> None:
    stand_in(one=["blab"], other=["blab and fail"])
    failed = demo.tuneline("run", "demo", "-v", status=1, HF_TOKEN=TOKEN, PREFECT_API_URL="")
    assert "cannot reach https://user:***@hub" in failed.stderr
    assert TOKEN not in failed.stdout + failed.stderr
    assert files_with(demo.root, TOKEN) == [], "not in the database of the run's own server either"


def test_a_token_in_the_file_or_a_flag_is_refused(demo: Project) -> None:
    text = (demo.root / "pipelines.yaml").read_text()
    demo.write(text.replace("timeout: 60", f"timeout: 60, description: 'with {TOKEN}'"))
    with pytest.raises(ConfigError) as error:
        load(demo.root / "pipelines.yaml")
    assert str(error.value) == (
        "pipelines.yaml:9:118: demo.other.description: found a token, expected none: it would be visible in keys, manifests and Prefect's parameters\n\n"
        "hint: remove it, and set the token in the environment of the process, for example as HF_TOKEN"
    )
    demo.write(text)
    with pytest.raises(ConfigError, match=r"^--set one\.description: found the value of WANDB_API_KEY, expected no secrets: Prefect shows"):
        load(demo.root / "pipelines.yaml", "demo", ["one.description=x-not-shown-1"], environment={"WANDB_API_KEY": "not-shown-1"})
    with pytest.raises(ConfigError, match=r"^--set one\.description: demo\.one\.description: found a token, expected none"):
        load(demo.root / "pipelines.yaml", "demo", [f"one.description={TOKEN}"], environment={})


def test_what_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if "TOKEN" in name or "SECRET" in name or "KEY" in name:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefgh")
    monkeypatch.setenv("DB_PASSWORD", "abcdefgh-longer")
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    assert masked(b"abcdefgh-longer and abcdefgh, short falsefalse") == b"*** and ***, short falsefalse"
