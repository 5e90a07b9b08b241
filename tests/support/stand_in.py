"""A program that does as it is told, for faults that real programs do not make on demand. See the fixture `stand_in`.

Its actions stand in script.json of the project, by the content of the stage's first outside file: `ok`, `sleep`, `deaf` (to SIGTERM), `die`,
`oom` (class), `kill` (SIGKILL to itself), `data` (class), `tired` (`transient` after a second and a half), `blab` and `blab and fail` (tell HF_TOKEN to everyone), `slow` (half a second, file by file), or a number: the value of its metric. `wait` goes on once there is a file `go`;
`edit` and `edit and put back` write to the stage's first file; `reference` keeps a model by reference; `fill` fills the disk and dies without a word, `hoard` does so with checkpoints, `brim` fills it and ends well.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tuneline.protocol import Events, Failure, Request, Result

request = Request.read(Path(sys.argv[1]))
events = Events(request.work / "events.jsonl")
project = request.work.parent.parent.parent
source = request.files.get("sources.0.path")
name = source[0].stem if source else request.kind
calls = project / f"calls-{name}"
number = len(calls.read_text().splitlines()) if calls.exists() else 0
with calls.open("a") as file:
    file.write(json.dumps({"pid": os.getpid(), "micro": request.resources["micro_batch_size"], "attempt": request.attempt}) + "\n")
actions = json.loads((project / "script.json").read_text()).get(name, [])
action = actions[number] if number < len(actions) else "ok"
print(f"stand-in {name}: {action}", flush=True)
events.progress(1, 2, "half")
if action == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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
    Failure(failure_class=action, message=f"planted {action}", hint="none").write(request.work / "failure.json")
    sys.exit(1)
if action in ("blab", "blab and fail"):
    secret = os.environ["HF_TOKEN"]
    print(f"cannot reach https://user:{secret}@hub", flush=True)
    print(secret, file=sys.stderr, flush=True)
    events.warning(f"the token {secret} is old")
    events.sample(secret, {"token": secret})
    if action == "blab":
        (request.meta).mkdir(parents=True, exist_ok=True)
        (request.payload / "data.json").parent.mkdir(parents=True, exist_ok=True)
        (request.payload / "data.json").write_text("{}")
        Result(metrics={"figure": 1.0}, info={"source": secret}).write(request.work / "result.json")
        sys.exit(0)
    Failure(failure_class="bug", message=f"401 for {secret}", hint=f"renew {secret}", details=secret).write(request.work / "failure.json")
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
value = float(action) if isinstance(action, int | float) else 1.0
request.payload.mkdir(parents=True, exist_ok=True)
request.meta.mkdir(parents=True, exist_ok=True)
upstream = {slot: entry.digest for slot, entry in request.inputs.items()}
if action == "reference":
    entry = {"path": "config.json", "size": 2, "sha256": ""}
    (request.payload / "reference.json").write_text(json.dumps({"files": [entry]}))
if action == "slow":
    for i in range(10):
        (request.payload / f"{i}.bin").write_bytes(bytes([i]) * 100_000)
        time.sleep(0.05)
if action in ("fill", "hoard", "brim"):
    with contextlib.suppress(OSError), ((request.work if action == "hoard" else request.payload) / "big").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    if action != "brim":
        os._exit(9)
    Result().write(request.work / "result.json")
    os._exit(0)
(request.payload / "data.json").write_text(json.dumps({"upstream": upstream, "name": name}))
Result(metrics={"figure": value}).write(request.work / "result.json")
