"""`tuneline up` and `down` as a user calls them."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from processes import marked
from project import ROOT, Project, place_stand_in

from flows.server import server_state
from flows.server.connect import free_port

PIPELINES = """\
version: 1
runtimes: {stand-in: {python: bin/python}}
pools:
  here:  {type: process}
  there: {type: process, local: false}
pipelines:
  demo:
    pool: here
    tags: [nightly]
    stages:
      one: {kind: dataset, runtime: stand-in, sources: [{type: files, path: one.txt}]}
"""


class Lasting:
    """A project whose `up` is ended, whatever happens."""

    def __init__(self, root: Path, auth: str | None = None):
        """`auth`: the user and password that its server asks for, as `user:password`."""
        self.project, self.auth = Project(root), auth
        self.project.write(PIPELINES)
        self.project.write("one", "one.txt")
        self.script = place_stand_in(self.project)
        self.mark, self.folder, self.port = f"up{root.name}{os.getpid()}", server_state.folder_of(root), free_port()
        self.address = f"http://127.0.0.1:{self.port}/api"

    def up(self, *arguments: str, **environment: str) -> Any:
        if self.auth:
            arguments, environment = (*arguments, "--auth"), {**environment, "PREFECT_SERVER_API_AUTH_STRING": self.auth}
        return self.project.json("up", "--port", str(self.port), *arguments, MARK=self.mark, **environment)

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.auth:
            headers["Authorization"] = f"Basic {base64.b64encode(self.auth.encode()).decode()}"
        request = urllib.request.Request(f"{self.address}/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def prefect(self, *arguments: str) -> str:
        env = {**os.environ, "PREFECT_API_URL": self.address, "PREFECT_HOME": str(self.folder), "PYTHONPATH": str(ROOT)}
        if self.auth:
            env["PREFECT_API_AUTH_STRING"] = self.auth
        done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=self.project.root)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def end(self) -> None:
        process = self.project.start("down")
        process.communicate(timeout=120)
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)
