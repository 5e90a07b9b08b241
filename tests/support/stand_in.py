"""A program that follows a script, for faults that real programs do not make on demand. See the fixture `stand_in`.

Its actions stand in script.json of the project, by the content of the stage's first outside file: `ok`, `sleep`, `deaf` (to SIGTERM, which it notes), `die`,
`oom` (class), `kill` (SIGKILL to itself), `data` (class), `tired` (`transient` after a second and a half), `blab` and `blab and fail` (tell HF_TOKEN to everyone), `slow` (half a second, file by file), or a number: the value of its metric. `wait` goes on once there is a file `go`;
`edit` and `edit and put back` write to the stage's first file; `reference` keeps a model by reference; `fill` fills the disk and dies without a word, `hoard` does so with checkpoints, `brim` fills it and ends well.

It starts hundreds of times, so it writes by hand what programs write through tuneline.workspace.protocol; tests/core/test_stand_in.py compares.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCHEMA = 6  # of requests, results and failures


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_bytes())
    assert request["schema"] == SCHEMA
    work, payload, meta = Path(request["work"]), Path(request["out"], "payload"), Path(request["out"], "meta")

    def event(**fields: Any) -> None:
        with (work / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"t": round(time.time(), 3), **fields}) + "\n")

    def end(name: str, **fields: Any) -> None:
        temporary = work / f"{name}.json.tmp"
        temporary.write_text(json.dumps({"schema": SCHEMA, **fields}), encoding="utf-8")
        temporary.replace(work / f"{name}.json")

    project = work.parent.parent.parent
    source = [Path(path) for path in request["files"].get("sources.0.path", ())]
    name = source[0].stem if source else request["kind"]
    calls = project / f"calls-{name}"
    number = len(calls.read_text().splitlines()) if calls.exists() else 0
    with calls.open("a") as file:
        call = {"pid": os.getpid(), "micro": request["resources"]["micro_batch_size"], "attempt": request["attempt"]}
        file.write(json.dumps(call) + "\n")
    actions = json.loads((project / "script.json").read_text()).get(name, [])
    action = actions[number] if number < len(actions) else "ok"
    print(f"stand-in {name}: {action}", flush=True)
    event(type="progress", step=1, total=2, message="half")
    if action == "deaf":
        signal.signal(signal.SIGTERM, lambda *_: (project / f"asked-{name}").write_text(""))
    if action in ("sleep", "deaf"):
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        (project / f"sleeping-{name}").write_text("")
        time.sleep(1000)
    if action == "die":
        sys.exit(9)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "tired":
        time.sleep(1.5)
        action = "transient"
    if action in ("oom", "data", "transient", "config"):
        end("failure", **{"class": action}, message=f"planted {action}", hint="none")
        sys.exit(1)
    for folder in (payload, meta):
        folder.mkdir(parents=True, exist_ok=True)
    if action in ("blab", "blab and fail"):
        secret = os.environ["HF_TOKEN"]
        print(f"cannot reach https://user:{secret}@hub", flush=True)
        print(secret, file=sys.stderr, flush=True)
        event(type="warning", message=f"the token {secret} is old")
        event(type="sample", message=secret, data={"token": secret})
        if action == "blab":
            (payload / "data.json").write_text("{}")
            end("result", metrics={"figure": 1.0}, info={"source": secret})
            sys.exit(0)
        end("failure", **{"class": "bug"}, message=f"401 for {secret}", hint=f"renew {secret}", details=secret)
        sys.exit(1)
    if action == "edit":
        source[0].write_text("edited while it was read")
    if action == "edit and put back":
        before = source[0].read_text()
        source[0].write_text("another branch")
        source[0].write_text(before)
    if action == "wait":
        (project / f"waiting-{name}").write_text("")
        while not (project / "go").exists():
            time.sleep(0.05)
    if action == "reference":
        entry = {"path": "config.json", "size": 2, "sha256": ""}
        (payload / "reference.json").write_text(json.dumps({"files": [entry]}))
    if action == "slow":
        for i in range(10):
            (payload / f"{i}.bin").write_bytes(bytes([i]) * 100_000)
            time.sleep(0.05)
    if action in ("fill", "hoard", "brim"):
        with contextlib.suppress(OSError), ((work if action == "hoard" else payload) / "big").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        if action != "brim":
            os._exit(9)
        end("result")
        os._exit(0)
    upstream = {slot: entry["digest"] for slot, entry in request["inputs"].items()}
    (payload / "data.json").write_text(json.dumps({"upstream": upstream, "name": name}))
    end("result", metrics={"figure": float(action) if isinstance(action, int | float) else 1.0})


main()
