"""A hub on loopback that takes pushes and gives them back, as huggingface_hub asks of the real one: repositories, branches, large files
by Git LFS, commits, trees and downloads. It keeps everything in memory, and counts."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hub-secret-token"
ENVIRONMENT = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "NO_PROXY": "*"}


class LocalHub:
    """What the hub holds. A branch is a list of commits; a commit maps paths to contents."""

    def __init__(self) -> None:
        self.address = ""
        self.repositories: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.uploads = 0
        self.broken_commits = 0
        """Number of commits to refuse with HTTP 500."""

    def commit_id(self, repository: str, branch: str) -> str:
        commits = self.repositories[repository][branch]
        return hashlib.sha1(f"{repository}{branch}{len(commits)}".encode()).hexdigest()

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        if repository not in self.repositories:
            return {}
        commits = self.repositories[repository][self.branch(repository, revision)]
        return commits[-1] if commits else {}

    def branch(self, repository: str, revision: str) -> str:
        """Return the branch that is named, or whose last commit is."""
        return next(name for name in self.repositories[repository] if revision in (name, self.commit_id(repository, name)))


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    hub = LocalHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, status: int, content: Any, **headers: str) -> None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

        def parts(self) -> list[str]:
            return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

        def do_PUT(self) -> None:
            hub.large[self.parts()[-1]] = self.body()
            hub.uploads += 1
            self.answer(200, {})

        def do_POST(self) -> None:
            body = self.body()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, {"error": "no token"})
                return
            match self.parts():
                case ["api", "repos", "create"]:
                    self.create(json.loads(body))
                case ["api", "validate-yaml"]:
                    errors = [{"message": '"license" must be one of ...'}] if "license: none-such" in json.loads(body)["content"] else []
                    self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
                case ["api", "models", owner, name, "branch", branch]:
                    branches = hub.repositories[f"{owner}/{name}"]
                    self.answer(409 if branch in branches else 200, {})
                    branches.setdefault(branch, list(branches["main"]))
                case ["api", "models", owner, name, "preupload", branch]:
                    there = hub.files(f"{owner}/{name}", branch)
                    self.answer(200, {"files": [before_upload(file, there) for file in json.loads(body)["files"]]})
                case [_, _, "info", "lfs", "objects", "batch"]:
                    objects = [large_file(each) for each in json.loads(body)["objects"]]
                    self.answer(200, {"transfer": "basic", "objects": objects})
                case ["api", "models", owner, name, "commit", branch]:
                    self.commit(f"{owner}/{name}", branch, [json.loads(line) for line in body.splitlines()])
                case _:
                    self.answer(404, {"error": self.path})

        def create(self, wanted: dict[str, Any]) -> None:
            name = f"{wanted['organization']}/{wanted['name']}"
            if name.startswith("others/"):
                self.answer(403, {"error": "not yours"})
                return
            exists = name in hub.repositories
            if not exists:
                hub.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
                hub.repositories[name] = {"main": []}
            self.answer(409 if exists else 200, {"url": f"{hub.address}/{name}"})

        def commit(self, repository: str, branch: str, lines: list[dict[str, Any]]) -> None:
            if hub.broken_commits:
                hub.broken_commits -= 1
                self.answer(500, {"error": "broken"})
                return
            files = dict(hub.files(repository, branch))
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                elif key == "deletedFile":
                    del files[value["path"]]
            hub.repositories[repository][branch].append(files)
            commit = hub.commit_id(repository, branch)
            url = f"{hub.address}/{repository}/commit/{commit}"
            self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

        def do_GET(self) -> None:
            match self.parts():
                case ["api", "models", owner, name, *rest] if (repository := f"{owner}/{name}") in hub.repositories:
                    revision = rest[1] if len(rest) > 1 else "main"
                    files = hub.files(repository, revision)
                    if rest[:1] == ["tree"]:
                        self.answer(200, [{"type": "file", "path": path, "size": len(c), "oid": oid(c)} for path, c in files.items()])
                        return
                    sha = hub.commit_id(repository, hub.branch(repository, revision))
                    siblings = [{"rfilename": path} for path in files]
                    self.answer(200, {"id": repository, "sha": sha, "siblings": siblings, "tags": [], "private": hub.private[repository]})
                case [owner, name, "resolve", revision, *path] if "/".join(path) in hub.files(f"{owner}/{name}", revision):
                    content = hub.files(f"{owner}/{name}", revision)["/".join(path)]
                    commit = hub.commit_id(f"{owner}/{name}", hub.branch(f"{owner}/{name}", revision))
                    self.answer(200, content, ETag=f'"{oid(content)}"', X_Repo_Commit=commit)
                case _:
                    self.answer(404, {"error": self.path}, X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

    def large_file(wanted: dict[str, Any]) -> dict[str, Any]:
        known = wanted["oid"] in hub.large
        return wanted | ({} if known else {"actions": {"upload": {"href": f"{hub.address}/large/{wanted['oid']}"}}})

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


def before_upload(file: dict[str, Any], there: dict[str, bytes]) -> dict[str, Any]:
    """What a commit of a file would be: large files go to LFS; of a file that is there, the id of its content."""
    large = file["path"].endswith(".safetensors")
    content = there.get(file["path"])
    known = {} if content is None else {"oid": hashlib.sha256(content).hexdigest() if large else oid(content)}
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known}


def oid(content: bytes) -> str:
    """Git's name of a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
