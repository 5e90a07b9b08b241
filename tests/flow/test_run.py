"""Runs through Prefect, with a stand-in for the programs that fails on demand: states, retries by class, gates, skips, records."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from demo_project import PIPELINES, statuses
from processes import PATIENCE, gone, marked, until
from project import ROOT, Project

from flows.report import progress
from flows.run import forced
from tuneline.trees import file_memory
from tuneline.workspace.runs import RunRecord, Runs, StageRecord
from tuneline.workspace.store import Store


@pytest.fixture
def mark(demo: Project) -> str:
    return f"{demo.root.name}{os.getpid()}"


def calls(project: Project, name: str) -> list[dict[str, Any]]:
    path = project.root / f"calls-{name}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_then_everything_cached(demo: Project, run: Callable[..., Any]) -> None:
    record, states = run()
    assert record.state == "completed"
    assert set(statuses(record).values()) == {"done"}
    assert states.pop("id")
    assert states == {**dict.fromkeys(["flow", "one", "two", "other", "gate", "after"], "Completed")}
    record, states = run()
    assert statuses(record) == {"one": "cached", "two": "cached", "other": "cached", "gate": "done", "after": "cached"}
    assert {name: states[name] for name in ("one", "two", "gate", "flow")} == {
        "one": "Cached",
        "two": "Cached",
        "gate": "Completed",
        "flow": "Completed",
    }
    assert len(calls(demo, "one")) == 1
    work = demo.root / ".tuneline" / "work"
    assert not any(work.iterdir())


@pytest.mark.slow
def test_a_failure_skips_what_needs_it_and_spares_the_rest(demo: Project, stand_in: Callable[..., None], run: Callable[..., Any]) -> None:
    stand_in(one=["data", "ok"])
    record, states = run()
    assert record.state == "failed"
    assert statuses(record) == {"one": "failed", "two": "skipped", "other": "done", "gate": "skipped", "after": "skipped"}
    assert states.pop("id")
    assert states == {
        "flow": "Failed",
        "one": "Failed: data",
        "two": "Skipped",
        "other": "Completed",
        "gate": "Skipped",
        "after": "Skipped",
    }
    assert record.stages[0].message == "data: planted data\n\nhint: none"
    assert len(calls(demo, "one")) == 1  # class data is not retried
    assert run()[0].state == "completed"  # and a failure is never cached


@pytest.mark.slow
def test_a_passing_failure_is_tried_again_within_the_budget(demo: Project, stand_in: Callable[..., None], run: Callable[..., Any]) -> None:
    stand_in(one=["transient", "transient", "ok"])
    assert run()[0].state == "completed"
    assert [call["attempt"] for call in calls(demo, "one")] == [1, 2, 3]


@pytest.mark.slow
def test_the_time_of_a_stage_is_that_of_all_its_attempts(
    demo: Project,
    stand_in: Callable[..., None],
    run: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows.report.tables import run_table
    from flows.run.supervisor import Supervisor

    waiting: list[StageRecord] = []

    def pause(_supervisor: Supervisor, seconds: float) -> None:
        record = Runs(demo.root / ".tuneline" / "runs").get("demo", None)
        waiting.extend(stage for stage in record.stages if stage.stage == "one")

    monkeypatch.setattr(Supervisor, "pause", pause)
    stand_in(one=["tired", "tired", "ok"])
    record, _ = run()
    assert [(stage.status, stage.started, stage.attempts) for stage in waiting] == [("running", None, 1), ("running", None, 2)]
    stages = {stage.stage: stage for stage in record.stages}
    assert (stages["one"].attempts, stages["two"].attempts, stages["gate"].attempts) == (3, 1, 0)
    assert stages["one"].seconds > 3
    run_table([stages["one"]])
    assert " s in 3 attempts " in capsys.readouterr().out


@pytest.mark.slow
def test_an_unexplained_death_is_tried_once_and_then_a_bug(demo: Project, stand_in: Callable[..., None], run: Callable[..., Any]) -> None:
    stand_in(one=["kill", "die"])
    record, _ = run("one.retries=5")
    assert len(calls(demo, "one")) == 2
    assert "ended with status 9 without saying why, twice" in record.stages[0].message
    assert "stand-in one: die" in record.stages[0].message  # the tail of its log
    assert run()[0].state == "completed"


@pytest.mark.slow
def test_a_stage_whose_watchdog_is_killed_is_tried_again_alone(
    demo: Project, stand_in: Callable[..., None], run: Callable[..., Any], mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        until(lambda: (demo.root / "sleeping-one").exists())
        program = calls(demo, "one")[-1]["pid"]  # `other` may have its watchdog at the same time
        watchdog = int(Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()[1])
        assert b"watchdog.py" in Path(f"/proc/{watchdog}/cmdline").read_bytes()
        os.kill(watchdog, signal.SIGKILL)

    monkeypatch.setenv("MARK", mark)
    stand_in(one=["sleep"])
    killer = threading.Thread(target=kill)
    killer.start()
    record, _ = run()
    killer.join()
    assert record.state == "completed"
    assert len(calls(demo, "one")) == 2
    assert gone(mark)  # also the process that the first attempt had started
    stand_in(one=["ok", "ok", "sleep"])
    (demo.root / "sleeping-one").unlink()
    killer = threading.Thread(target=kill)
    killer.start()
    record, _ = run("one.retries=0", force=["one"])
    killer.join()
    assert (
        record.stages[0].message == "transient: the program's watchdog was ended by signal 9\n\nhint: it is retried once, within `retries`"
    )


SCORED = """\
version: 1
runtimes: {stand-in: {python: bin/python}}
pipelines:
  demo:
    stages:
      base:   {kind: model, runtime: stand-in, gguf: one.txt}
      scored: {kind: evaluate, runtime: stand-in, model: base, benchmarks: [any], resources: {micro_batch_size: 4}}
"""


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_down_to_one(demo: Project, stand_in: Callable[..., None], run: Callable[..., Any]) -> None:
    demo.write(SCORED)
    stand_in(evaluate=["oom", "oom", "oom", "oom"])
    record, _ = run("scored.retries=9")
    assert [call["micro"] for call in calls(demo, "evaluate")] == [4, 2, 1]
    assert record.state == "failed"
    record, _ = run()  # failed attempts are kept
    assert [call["micro"] for call in calls(demo, "evaluate")][3:] == [1]
    assert "planted oom" in record.stages[1].message


@pytest.mark.slow
def test_a_timeout_ends_a_stage_without_another_try(demo: Project, stand_in: Callable[..., None], run: Callable[..., Any]) -> None:
    stand_in(other=["sleep"])
    record, states = run("other.timeout=2")
    assert states["other"] == "Failed: config"
    assert "ended after its timeout of 2 s" in next(stage.message for stage in record.stages if stage.stage == "other")
    assert len(calls(demo, "other")) == 1


def test_log_and_progress_reach_the_server_and_no_path_the_manifest(demo: Project, run: Callable[..., Any]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter, LogFilterFlowRunId
    from prefect.logging.handlers import APILogHandler

    record, states = run()
    APILogHandler().flush()
    with get_client(sync_client=True) as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[states["id"]])))
        bars = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[states["id"]])))
    assert "stand-in one: ok" in [log.message for log in logs]
    assert {(bar.data, bar.task_run_id is None) for bar in bars if bar.type == "progress"} == {(50.0, False)}
    folder = Path(record.stages[0].artifact or "")
    assert "stand-in one: ok" in (folder / "meta" / "log.txt").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert str(demo.root) not in json.dumps(manifest)


@pytest.mark.slow
def test_a_file_that_changes_while_it_is_read_is_never_stored(
    demo: Project, stand_in: Callable[..., None], run: Callable[..., Any]
) -> None:
    stand_in(one=["edit"], other=["edit and put back"])
    record, _ = run()
    assert statuses(record)["one"] == "failed"
    assert "files that the stage reads have changed since the run began" in record.stages[0].message
    # What `other` read is unknown, so it is discarded; but the stage does not fail.
    assert statuses(record)["other"] == "done"
    assert len(calls(demo, "other")) == 2
    demo.write("one", "one.txt")
    record, _ = run()
    assert statuses(record)["one"] == "done"


@pytest.mark.slow
def test_a_hit_never_points_at_a_model_that_changed_since_its_key_was_computed(
    demo: Project, stand_in: Callable[..., None], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.write(PIPELINES.partition("    stages:")[0] + "    stages:\n      base: {kind: model, runtime: stand-in, path: base}\n")
    (demo.root / "base").mkdir()
    demo.write("{}", "base/config.json")
    stand_in(model=["reference"])
    assert statuses(run()[0]) == {"base": "done"}
    assert statuses(run()[0]) == {"base": "cached"}
    real = Store.find
    monkeypatch.setattr(Store, "find", lambda store, kind, key: demo.write("[]", "base/config.json") and real(store, kind, key))
    record, _ = run()
    assert statuses(record) == {"base": "failed"}
    assert "files that the stage reads have changed since the run began" in record.stages[0].message


def test_a_task_lists_a_tree_once_and_writes_the_memory_of_files_once(
    demo: Project, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = """
      base: {kind: model, runtime: stand-in, path: base}
      code: {kind: dataset, runtime: stand-in, model: base, sources: [{type: code, path: tree}]}
"""
    demo.write(PIPELINES.partition("    stages:")[0] + "    stages:" + stages)
    for name in ("base/config.json", "tree/0/a.py", "tree/1/a.py"):
        (demo.root / name).parent.mkdir(parents=True)
        demo.write("{}", name)
    monkeypatch.setattr(file_memory, "TICK", -(10**12))  # what was just written counts as old
    listed, saved = list[str](), list[str]()
    real_entries, real_replace = file_memory.Look.entries, Path.replace
    monkeypatch.setattr(file_memory.Look, "entries", lambda look, folder: listed.append(folder) or real_entries(look, folder))
    monkeypatch.setattr(Path, "replace", lambda path, target: saved.append(Path(target).name) or real_replace(path, target))
    record, _ = run()
    assert statuses(record) == {"base": "done", "code": "done"}
    assert sorted(folder.removeprefix(f"{demo.root}/") for folder in listed) == ["base/", "tree/", "tree/0/", "tree/1/"]
    assert saved.count("digests.json") == 2, "one for each task"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "disk: /store: No space left on device"), (errno.ENOENT, "FileNotFoundError: ")]
)
def test_a_full_disk_is_told_from_a_bug_of_ours(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number), "/store")

    monkeypatch.setattr("tuneline.workspace.store.Store.publish", fail)
    record, _ = run()
    assert record.state == "failed"
    assert record.stages[0].message.startswith(message)


# --- the real command, in a new process -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.process
def test_the_command_line_end_to_end(demo: Project, stand_in: Callable[..., None], prefect_server: str) -> None:
    own_server = {"PREFECT_API_URL": ""}
    stand_in(two=[0.25, 0.75])
    out = demo.json("run", "demo", status=3, **own_server)
    assert out["state"] == "refused"
    assert [stage["status"] for stage in out["stages"]] == ["done", "done", "done", "refused", "skipped"]
    again = demo.tuneline("run", "demo", "--force", "two", "--verbose")
    assert "stand-in two: 0.75" in again.stderr
    assert "demo completed" in again.stderr
    assert "figure 0.75" in again.stdout
    refused = demo.tuneline("run", "demo", "--set", "gate.require.0.at_least=2", status=3, **own_server)
    assert "starting Prefect" not in refused.stderr
    assert "NOT met: figure of two is 0.75, required at least 2" in refused.stdout
    assert "after: skipped (needs gate)" in refused.stderr
    no_gpu = demo.tuneline("run", "demo", "--set", "one.resources.gpus=1", "--force", "one", status=2, CUDA_VISIBLE_DEVICES="")
    assert "demo.one.resources.gpus: found 1, but this machine shows 0" in no_gpu.stderr
    Path(out["stages"][0]["artifact"], "payload", "data.json").unlink()
    rebuilt = demo.tuneline("run", "demo", "--json")
    assert "store: warning: dataset/" in rebuilt.stderr
    assert [stage["status"] for stage in json.loads(rebuilt.stdout)["stages"]] == [
        "done",
        "cached",
        "cached",
        "done",
        "cached",
    ]  # the same bytes
    cached = demo.tuneline("run", "demo", **own_server)
    assert "starting Prefect" not in cached.stderr
    assert {stage["status"] for stage in demo.json("plan", "demo")["stages"] if stage["kind"] != "gate"} == {"cached"}
    shown = demo.json("show", "demo")
    assert shown["stages"]["two"]["metrics"] == {"figure": 0.75}
    assert demo.json("show", "demo/two")["kind"] == "dataset"
    facts = demo.tuneline("show", "demo/two").stdout
    assert re.match(r"stage    two\nkind     dataset\nstatus   cached\nkey      [0-9a-f]{64}\nmade     20..-..-.. ..:..:.. UTC\n", facts)
    assert "inputs   needs: one\nmetrics  figure 0.75\npayload  .tuneline/store/dataset/" in facts
    assert demo.tuneline("show", "demo/after", "--run", out["run_id"]).stdout == (
        "stage    after\nkind     dataset\nstatus   skipped\nmessage  needs gate\ninputs   needs: gate\n"
    )
    assert demo.json("show", "demo", "--run", out["run_id"])["state"] == "refused"
    assert demo.tuneline("verify").stderr == "4 artifacts, 0 damaged\n"
    Path(out["stages"][0]["artifact"], "payload", "data.json").write_text("x" * 48)
    assert "payload/data.json" in demo.tuneline("verify", status=1).stdout


def test_a_configured_server_that_is_away_is_said(demo: Project) -> None:
    result = demo.tuneline("run", "demo", status=2, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert result.stderr.startswith("PREFECT_API_URL: found no Prefect server at http://127.0.0.1:9/api")
    assert "hint: start it (`tuneline up`, if it was that one), or unset PREFECT_API_URL" in result.stderr


def test_a_configured_server_that_is_another_is_said(demo: Project) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/api"
        result = demo.tuneline("run", "demo", status=2, PREFECT_API_URL=address)
        server.shutdown()
        thread.join()
    assert result.stderr.startswith(f"PREFECT_API_URL: found no Prefect server at {address} (HTTP Error 404")


def asleep(project: Project, process: subprocess.Popen[str], name: str = "one") -> None:
    until(lambda: (project.root / f"sleeping-{name}").exists(), process)


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.process), signal.SIGTERM])
def test_a_killed_run_leaves_no_process_and_the_next_completes(
    demo: Project, stand_in: Callable[..., None], prefect_server: str, mark: str, number: signal.Signals
) -> None:
    stand_in(one=["sleep"])
    own_server = {"PREFECT_API_URL": ""} if number == signal.SIGKILL else {}
    process = demo.start("run", "demo", MARK=mark, **own_server)
    asleep(demo, process)
    assert demo.json("show", "demo")["state"] == "running"
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert gone(mark)
    assert "Traceback" not in err
    if number == signal.SIGKILL:
        assert demo.json("show", "demo")["state"] == "killed"
        (row,) = [line.split() for line in demo.tuneline("show", "demo").stdout.splitlines() if line.startswith("one ")]
        assert row[:3] == ["one", "dataset", "killed"]
        assert float(row[3]) > 0
        (stage,) = [stage for stage in demo.json("show", "demo")["record"] if stage["stage"] == "one"]
        log = demo.root / ".tuneline" / "work" / stage["key"] / "log.txt"
        assert stage["message"] == f"reached step 1 of 2; its log is {log}"
    else:
        assert process.returncode == 130, err
        assert "one: cancelled (stopped with the run)" in err
        shown = demo.json("show", "demo")
        assert shown["state"] == "cancelled"
        assert {stage["stage"]: stage["status"] for stage in shown["record"]}["one"] == "cancelled"
        (row,) = [line.split() for line in demo.tuneline("show", "demo").stdout.splitlines() if line.startswith("one ")]
        assert (row[2], row[5:12]) == ("cancelled", ["stopped", "with", "the", "run;", "its", "log", "is"])
    killed = demo.json("show", "demo")["run_id"]
    assert demo.json("run", "demo")["state"] == "completed"
    assert "its log is" not in demo.tuneline("show", "demo", "--run", killed).stdout  # it has gone into the artifact


@pytest.mark.slow
def test_a_force_is_paid_once(demo: Project, stand_in: Callable[..., None], run: Callable[..., Any], mark: str) -> None:
    """Called again after a kill, it reuses what it has built; called again after its end, it rebuilds."""
    force = ("--force", "one", "--force", "two")
    run()
    stand_in(two=["ok", "sleep"])
    process = demo.start("run", "demo", *force, MARK=mark)
    until((demo.root / "sleeping-two").exists, process)
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert gone(mark)
    rows = {
        row["stage"]: (row["status"], [reason["code"] for reason in row["reasons"]]) for row in demo.json("plan", "demo", *force)["stages"]
    }
    assert (rows["one"], rows["two"]) == (("cached", ["forced"]), ("run", ["forced"]))
    again = demo.json("run", "demo", *force)
    assert {row["stage"]: row["status"] for row in again["stages"]} | {"gate": ""} == {
        "one": "cached",
        "two": "done",
        "other": "cached",
        "gate": "",
        "after": "cached",
    }
    assert (len(calls(demo, "one")), len(calls(demo, "two"))) == (2, 3)
    assert demo.json("run", "demo", "--force", "one")["stages"][0]["status"] == "done"
    assert len(calls(demo, "one")) == 3


def test_a_force_goes_on_with_what_it_began(tmp_path: Path) -> None:
    def record(run: str) -> RunRecord:
        return RunRecord(run_id=run, pipeline="demo", started="", flow_run=f"flow-{run}")

    work, checkpoint = tmp_path / "key", tmp_path / "key" / "checkpoint"

    def left(run: str, tried: bool = False) -> bool:
        """Return whether a checkpoint is left once the run begins."""
        work.mkdir(exist_ok=True)
        checkpoint.touch()
        forced.begin(work, record(run), tried)
        return checkpoint.exists()

    assert not left("a")  # of a run without --force
    assert left("a", tried=True)  # the second attempt of one run
    assert left("b")  # `a` was killed
    forced.failed(work)
    assert left("b")  # Prefect's Retry of the run that failed
    forced.failed(work)
    assert not left("c")  # called again after a failure


@pytest.mark.slow
@pytest.mark.process
def test_a_closed_terminal_ends_the_run_in_order_but_not_under_nohup(
    demo: Project, stand_in: Callable[..., None], prefect_server: str, mark: str
) -> None:
    def own_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    stand_in(one=["sleep"])
    ours, theirs = os.openpty()
    command, env = [sys.executable, "-m", "flows", "run", "demo"], {**os.environ, "PYTHONPATH": str(ROOT), "MARK": mark}
    process = subprocess.Popen(
        command, cwd=demo.root, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=own_terminal
    )
    os.close(theirs)
    while not (demo.root / "sleeping-one").exists():
        os.read(ours, 65536)
    os.close(ours)
    assert process.wait(PATIENCE) == 130
    assert gone(mark)
    assert demo.json("show", "demo")["state"] == "cancelled"
    stand_in(one=["ok", "slow"])
    with subprocess.Popen(["nohup", *command], cwd=demo.root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until(lambda: len(calls(demo, "one")) == 2, process)
        process.send_signal(signal.SIGHUP)
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.process
def test_a_second_interrupt_ends_the_run_at_once(demo: Project, stand_in: Callable[..., None], prefect_server: str, mark: str) -> None:
    stand_in(one=["deaf"])
    process = demo.start("run", "demo", MARK=mark, TUNELINE_GRACE="3600")
    asleep(demo, process)
    process.send_signal(signal.SIGINT)
    until(lambda: (demo.root / "asked-one").exists(), process)  # it gives its program the grace
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "stopping; press Ctrl-C again to stop at once" in err
    assert gone(mark)
    assert demo.json("show", "demo")["state"] == "cancelled"


@pytest.mark.slow
def test_a_run_goes_on_without_the_server_and_says_so(demo: Project, stand_in: Callable[..., None], mark: str) -> None:
    stand_in(one=["slow"], other=["slow"])
    # No retry instead of two that take 6 s: every request after the server's end would wait for them.
    process = demo.start("run", "demo", MARK=mark, PREFECT_API_URL="", PREFECT_CLIENT_MAX_RETRIES="0")
    until(lambda: calls(demo, "one"), process)
    for pid in marked(mark):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"uvicorn" in line and b"watchdog" not in line:
                os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "Prefect: warning: the Prefect server has ended; the stages continue without it" in err
    assert "does not answer, so it does not know how this run ended" in err
    assert "Traceback" not in err
    assert "Error logging to API" not in err
    shown = demo.json("show", "demo")
    assert shown["state"] == "completed"
    assert all(shown["stages"][name] for name in ("one", "two", "other", "after"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, pytest.param(8, marks=pytest.mark.full)])
def test_runs_at_once_build_each_stage_once(demo: Project, stand_in: Callable[..., None], prefect_server: str, number: int) -> None:
    """One of four runs has its own server."""
    stand_in(**{name: ["slow"] for name in ("one", "two", "other", "after")})
    own_server = {"PREFECT_API_URL": ""}
    runs = [demo.start("run", "demo", "--json", **(own_server if i % 4 == 0 else {})) for i in range(number)]
    ends = [(*process.communicate(timeout=PATIENCE), process.returncode) for process in runs]
    assert [code for _, _, code in ends] == [0] * number, "\n".join(err for _, err, _ in ends)
    documents = [json.loads(out) for out, _, _ in ends]
    assert len({document["run_id"] for document in documents}) == number
    for i, name in enumerate(("one", "two", "other", "gate", "after")):
        statuses = sorted(document["stages"][i]["status"] for document in documents)
        assert [document["stages"][i]["stage"] for document in documents] == [name] * number
        assert statuses == ["done"] * number if name == "gate" else ["cached"] * (number - 1) + ["done"]
        assert len(calls(demo, name)) == (name != "gate")
    assert demo.tuneline("verify").stderr == "4 artifacts, 0 damaged\n"


@pytest.mark.slow
def test_a_busy_server_is_waited_for(demo: Project, prefect_server: str) -> None:
    """Prefect on SQLite answers 503 while others write. Its client gives up after a few tries (here the first) with a traceback."""
    refused, port = 0, int(prefect_server.split(":")[2].split("/")[0])

    def pipe(source: socket.socket, target: socket.socket, guarded: bool) -> None:
        nonlocal refused
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if guarded and data.startswith(b"POST /api/flow_runs/ ") and refused < 3:
                    refused += 1
                    source.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as server:
                back = threading.Thread(target=pipe, args=(server, self.request, False))
                back.start()
                pipe(self.request, server, True)
                back.join()

    class Proxy(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Proxy(("127.0.0.1", 0), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever).start()
        address = f"http://127.0.0.1:{proxy.server_address[1]}/api"
        result = demo.tuneline("run", "demo", PREFECT_API_URL=address, PREFECT_CLIENT_MAX_RETRIES="0")
        proxy.shutdown()
    assert result.returncode == 0, result.stderr
    assert refused == 3


@pytest.mark.slow
def test_prefect_shows_a_stage_with_its_figures(run: Callable[..., tuple[RunRecord, Any]]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    for ended in ("Completed", "Cached"):
        _record, states = run(only="two")
        with get_client(sync_client=True) as client:
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[states["id"]])))
        assert {task.name for task in tasks} == {"one: figure 1", "two: figure 1"}
        assert states["two"] == ended


@pytest.mark.slow
def test_the_log_of_a_stage_says_now_and_then_how_far_it_is(
    run: Callable[..., tuple[RunRecord, Any]], stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    stand_in(one=["slow"])
    _, states = run(only="one")

    def said() -> list[str]:
        with get_client(sync_client=True) as client:
            return [log.message for log in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[states["id"]])))]

    until(lambda: "one: step 1 of 2, half" in said())  # logs are sent in batches


def test_a_stage_that_another_pool_has_built_counts_though_its_run_crashed_there(
    demo: Project, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that ends while the server is away cannot report how."""
    from types import SimpleNamespace

    import flows.run.stage
    from flows.run.run_context import NoReporter
    from tuneline.config.load import load
    from tuneline.errors import StageFailed
    from tuneline.workspace.workspace import Workspace

    def crashes(*_: Any) -> None:
        raise StageFailed("transient", "its run in another pool ended Crashed", final=True)

    monkeypatch.setattr(flows.run.stage, "build_in_pool", crashes)
    record, _ = run()
    workspace, noted = Workspace(load(demo.root / "pipelines.yaml")), list[Any]()
    context: Any = SimpleNamespace(
        workspace=workspace, parameters={}, record=record, forced=frozenset(), reporter=NoReporter(), supervisor=None,
        attempt=lambda *_: contextlib.nullcontext(), note=lambda *entry: noted.append(entry[:2]),
    )  # fmt: skip
    stage = workspace.loaded.spec.pipelines["demo"].stages["one"]
    job: Any = SimpleNamespace(name="one", stage=stage, key=record.stages[0].key, inputs={})
    assert flows.run.stage._build_elsewhere(context, job).key == job.key
    assert noted == [("one", "done")]
    for change in (
        {"forced": frozenset({"one"})},
        {
            "workspace": Workspace(
                load(demo.write("version: 1\nstore: other\npipelines: {p: {stages: {one: {kind: model, hub: a/b}}}}\n", "other.yaml"))
            )
        },
    ):
        with pytest.raises(StageFailed, match="ended Crashed"):
            flows.run.stage._build_elsewhere(SimpleNamespace(**{**vars(context), **change}), job)


def test_an_input_that_another_run_replaced_while_it_was_read_is_noticed(demo: Project, run: Callable[..., Any]) -> None:
    """`--force` of another run publishes under the same key, perhaps with another result."""
    from types import SimpleNamespace

    from flows.run.build import _require_same_inputs
    from tuneline.config.load import load
    from tuneline.errors import StageFailed
    from tuneline.workspace.workspace import Workspace

    record, _ = run()
    store = Workspace(load(demo.root / "pipelines.yaml")).store
    artifact = store.find("dataset", record.stages[0].key)
    assert artifact is not None
    context: Any = SimpleNamespace(workspace=SimpleNamespace(store=store))
    job: Any = SimpleNamespace(inputs={"dataset": artifact})
    _require_same_inputs(context, job)
    manifest = artifact.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(artifact.digest, "0" * 64))
    with pytest.raises(StageFailed, match="another run replaced dataset/") as caught:
        _require_same_inputs(context, job)
    assert caught.value.retryable


def test_a_run_from_cache_alone_holds_what_gc_may_not_remove(demo: Project, run: Callable[..., Any]) -> None:
    from flows.commands.execute import _all_cached
    from flows.report.terminal import ConsoleReporter
    from tuneline.config.load import load
    from tuneline.errors import StageFailed
    from tuneline.planning.plan import plan
    from tuneline.workspace.workspace import Workspace

    run()
    workspace = Workspace(load(demo.root / "pipelines.yaml"))
    rows = plan(workspace, "demo")
    assert _all_cached(workspace, "demo", rows, None, ConsoleReporter(False)).state == "completed"
    assert rows[0].artifact is not None
    workspace.store.move_to_trash(rows[0].artifact.path)  # by `gc`, between the plan and the run
    with pytest.raises(StageFailed, match="the artifact of one was removed from the store meanwhile"):
        _all_cached(workspace, "demo", rows, None, ConsoleReporter(False))
