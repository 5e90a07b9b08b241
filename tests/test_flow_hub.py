"""Looking up what a branch means: against a small hub on loopback, and offline against the local hub cache."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows.hub import resolve_commit
from tuneline.errors import StageFailed

COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    tokens: list[str | None] = []

    def do_GET(self) -> None:
        Hub.tokens.append(self.headers.get("Authorization"))
        if self.path == "/api/models/owner/open/revision/refs%2Fpr%2F1":
            self.answer(200, {"sha": COMMIT})
        elif "gated" in self.path:
            self.answer(403, {})
        elif "broken" in self.path:
            self.answer(502, {})
        else:
            self.answer(404, {})

    def answer(self, status: int, body: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", "secret-token")
        Hub.tokens.clear()
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
@pytest.mark.parametrize(("name", "failure_class"), [("owner/gated", "auth"), ("owner/none", "config"), ("owner/broken", "transient")])
def test_a_refusal_has_its_class_and_no_token_in_it(name: str, failure_class: str) -> None:
    with pytest.raises(StageFailed, match="the hub") as caught:
        resolve_commit("dataset", name, "main")
    assert caught.value.failure_class == failure_class
    assert "secret-token" not in str(caught.value)


def test_an_unreachable_hub_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(StageFailed, match="cannot be reached") as caught:
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
