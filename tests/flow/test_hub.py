"""Resolving a branch to its commit: with a small hub on loopback, and offline with the local hub cache."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from project import Project

from flows.run.hub import resolve_commit
from tuneline.errors import StageFailed

COMMIT = "0123456789" * 4
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # of Qwen2.5-7B
PIPELINES = """\
version: 1
runtimes: {here: {python: PYTHON}}
pipelines:
  large:
    stages:
      base: {kind: model, runtime: here, hub: owner/NAME}
      data: {kind: dataset, runtime: here, sources: [{type: files, path: rows.jsonl}]}
      sft:  {kind: sft, runtime: here, model: base, dataset: data}
"""


class Hub(BaseHTTPRequestHandler):
    tokens: ClassVar[list[str | None]] = []
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Hub.tokens.append(self.headers.get("Authorization"))
        Hub.asked.append(self.path)
        if self.path in ("/api/models/owner/open/revision/refs%2Fpr%2F1", "/api/models/owner/open/revision/main"):
            self.answer(200, {"id": "owner/open", "sha": COMMIT, "siblings": [], "tags": []})
        elif self.path == "/api/datasets/owner/rows/revision/main":
            self.answer(200, {"id": "owner/rows", "sha": COMMIT, "siblings": [], "tags": []})
        elif self.path == f"/owner/open/resolve/{COMMIT}/config.json":
            self.answer(200, CONFIG)
        elif self.path == "/api/models/owner/portal/revision/main":
            self.answer(200, "please log in")
        elif "gated" in self.path:
            self.answer(403, {})
        elif "broken" in self.path:
            self.answer(502, {})
        else:
            self.answer(404, {})

    do_HEAD = do_GET

    def answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("ETag", '"1"'), ("X-Repo-Commit", COMMIT), ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", "secret-token")
        Hub.tokens.clear()
        Hub.asked.clear()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@pytest.mark.usefixtures("hub")
def test_a_branch_becomes_its_commit_and_a_commit_stays() -> None:
    assert resolve_commit("model", "owner/open", "refs/pr/1") == COMMIT
    assert Hub.tokens == ["Bearer secret-token"]
    assert resolve_commit("model", "owner/any", COMMIT) == COMMIT
    assert len(Hub.tokens) == 1


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "failure_class"), [("gated", "auth"), ("none", "config"), ("broken", "transient"), ("portal", "transient")]
)
def test_a_refusal_has_its_class_and_no_token_in_it(name: str, failure_class: str) -> None:
    with pytest.raises(StageFailed, match="the hub") as caught:
        resolve_commit("model", f"owner/{name}", "main")
    assert caught.value.failure_class == failure_class
    assert "secret-token" not in str(caught.value)


def test_online_a_plan_knows_what_a_hub_model_takes_before_it_is_fetched(project: Project, hub: None) -> None:
    project.write("{}", "rows.jsonl")
    project.write(PIPELINES.replace("PYTHON", sys.executable).replace("NAME", "open"))
    offline = project.json("plan", "large", HF_HUB_CACHE=str(project.root / "hub"))["stages"]
    assert [stage["status"] for stage in offline] == ["unknown", "run", "unknown"]
    assert offline[2]["estimate"]["unknown"] == "base has not been fetched yet; `--online` asks the hub"
    assert not Hub.tokens, "nobody was asked"
    online = project.json("plan", "large", "--online", HF_HUB_CACHE=str(project.root / "hub"))["stages"]
    assert [stage["status"] for stage in online] == ["run", "run", "run"]
    assert online[2]["estimate"]["parameters"] == 7_615_616_512
    assert set(Hub.tokens) == {"Bearer secret-token"}
    assert Hub.asked == ["/api/models/owner/open/revision/main", *[f"/owner/open/resolve/{COMMIT}/config.json"] * 2], "once for each thing"


@pytest.mark.parametrize(
    ("name", "said"),
    [("gated", "the hub refuses model owner/gated at main (HTTP 403)"), ("none", "the hub has no model owner/none at main")],
)
def test_online_a_model_that_is_not_to_be_had_is_found_before_a_run(name: str, said: str, project: Project, hub: None) -> None:
    project.write("{}", "rows.jsonl")
    project.write(PIPELINES.replace("PYTHON", sys.executable).replace("NAME", name))
    result = project.tuneline("plan", "large", "--online", status=2, HF_HUB_CACHE=str(project.root / "hub"))
    assert f"pipelines.yaml:6:47: large.base.hub: {said}\n\nhint: check " in result.stderr
    assert (result.stderr.count(said), result.stdout.count(said)) == (1, 0)
    assert "see the error above" in result.stdout


def test_online_each_repository_is_told_at_its_own_place(project: Project, hub: None) -> None:
    sources = "{type: hub, repo: owner/rows}, {type: hub, repo: owner/none}, {type: hub, repo: owner/gated}"
    project.write(f"version: 1\npipelines:\n  p:\n    stages:\n      data: {{kind: dataset, sources: [{sources}]}}\n")
    result = project.tuneline("plan", "p", "--online", status=2)
    assert re.findall(r"p\.data\.(\S+): the hub", result.stderr) == ["sources.1.repo", "sources.2.repo"]
    assert "p.data.sources.1.repo: the hub has no dataset owner/none at main" in result.stderr


def test_an_unreachable_hub_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(StageFailed, match="cannot be reached for model owner/name at main: .*Connection refused\n") as caught:
        resolve_commit("model", "owner/name", "main")
    assert caught.value.retryable


def test_offline_the_local_cache_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StageFailed, match="is not in the local hub cache") as caught:
        resolve_commit("dataset", "owner/name", "main")
    assert not caught.value.retryable
    reference = tmp_path / "datasets--owner--name" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT + "\n")
    assert resolve_commit("dataset", "owner/name", "main") == COMMIT


def test_offline_what_was_fetched_by_its_commit_is_main_where_it_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "datasets--owner--rows" / "snapshots"
    (snapshots / COMMIT).mkdir(parents=True)
    assert resolve_commit("dataset", "owner/rows", "main") == COMMIT
    with pytest.raises(StageFailed, match="owner/rows at v1 is not in the local hub cache"):
        resolve_commit("dataset", "owner/rows", "v1")
    (snapshots / COMMIT[::-1]).mkdir()
    with pytest.raises(StageFailed, match="owner/rows at main is not in the local hub cache"):
        resolve_commit("dataset", "owner/rows", "main")
