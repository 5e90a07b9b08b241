"""Kill the real `tuneline run` with SIGKILL at random moments, repeatedly, and check what is left.

After every kill: nothing half-written is in the store, the next run completes, its digests are those of an undisturbed run,
no process is left and no lock is held. `make torture KILLS=500 SEED=7` sets the number of kills; a failure prints its seed. By default
each target is killed once among stand-ins, and two among the real programs, which take much longer. The default seed is the
commit's: each commit is tested at different moments, and at the same ones when it is tested again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
from pico_project import copied
from processes import PATIENCE, gone, marked
from project import ROOT, Project

from tuneline.config.load import load
from tuneline.workspace.store import Store
from tuneline.workspace.workspace import Workspace


def commit() -> int:
    head = subprocess.run(["git", "rev-parse", "--short=8", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return int(head.stdout, 16) if head.returncode == 0 else 1


KILLS = int(os.environ.get("TORTURE_KILLS", "4"))
PICO_KILLS = int(os.environ.get("TORTURE_KILLS", "2"))
SEED = int(os.environ.get("TORTURE_SEED") or commit())
TARGETS = ("tree", "flow", "program", "watchdog")
STAND_INS = """\
version: 1
runtimes: {stand-in: {python: bin/python}}
pipelines:
  demo:
    parallel: 2
    stages:
      one:   {kind: dataset, runtime: stand-in, sources: [{type: files, path: one.txt}]}
      two:   {kind: dataset, runtime: stand-in, sources: [{type: files, path: two.txt}], needs: [one]}
      other: {kind: dataset, runtime: stand-in, sources: [{type: files, path: other.txt}]}
      gate:  {kind: gate, require: [{metric: figure, of: two, at_least: 0.5}]}
      after: {kind: dataset, runtime: stand-in, sources: [{type: files, path: after.txt}], needs: [gate]}
"""


class Torture:
    """A project that is killed and run again in each round."""

    def __init__(self, project: Project, pipeline: str, most: int, dice: random.Random):
        """`most`: number of stages to rebuild in a round."""
        self.project, self.pipeline, self.most, self.dice = project, pipeline, most, dice
        self.mark = f"torture-{pipeline}-{os.getpid()}"
        started = time.monotonic()
        self.run()
        self.workspace = Workspace(load(project.root / "pipelines.yaml"))
        hosts = [
            artifact.manifest.host for folder in self.workspace.store.artifacts() if (artifact := self.workspace.store.inspect(folder)[1])
        ]
        worked = (datetime.fromisoformat(host["finished"]) - datetime.fromisoformat(host["started"]) for host in hosts)
        self.seconds = max(time.monotonic() - started, sum(each.total_seconds() for each in worked))  # it may have been built before
        self.expected = self.digests()
        self.kills = self.deaths = 0
        self.targets: list[str] = []

    def run(self, **environment: str) -> None:
        self.project.tuneline("run", self.pipeline, MARK=self.mark, **environment)

    def digests(self) -> dict[str, str | None]:
        record = self.workspace.runs.get(self.pipeline, None)
        assert record.state == "completed"
        return {stage.stage: stage.digest for stage in record.stages}

    def kill_and_look(self, **environment: str) -> None:
        """Remove artifacts, start a run, kill it, check, and run again. Not counted if the run ended before the kill."""
        artifacts = list(self.workspace.store.artifacts())
        missing = self.dice.sample(artifacts, self.dice.randint(1, self.most))
        for folder in missing:
            shutil.rmtree(folder)
        self.targets = self.targets or self.dice.sample(TARGETS, len(TARGETS))  # each as often
        target, share = self.targets.pop(), self.dice.random()
        early = target in ("flow", "tree") and self.dice.random() < 0.3  # the others once a program runs: else most would hit imports
        wanted, seen = 0 if early else self.dice.randint(1, len(missing)), set[int]()
        started = time.monotonic()
        process = self.project.start("run", self.pipeline, MARK=self.mark, **environment)
        try:
            while len(seen) < wanted and process.poll() is None:
                time.sleep(0.02)
                seen.update(self.programs("watchdog.py"))
            time.sleep(share * self.seconds / (1 if early else 1.5 * len(artifacts)))
            killed = self.kill(target, process)
            self.kills += killed > 0
            if not killed:
                self.targets.append(target)
            print(f"{self.pipeline} {self.kills}: {killed} killed of {target}, after {time.monotonic() - started:.1f} s", flush=True)
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert process.returncode in ((-signal.SIGKILL, 0) if target in ("tree", "flow") else (0,))
        if process.returncode:
            self.deaths += 1
            assert gone(self.mark)
            runs = list(self.workspace.runs.newest_first(self.pipeline))
            assert not any(self.workspace.runs.alive(record) for record in runs)
            assert {record.state for record in runs} <= {"completed", "killed"}
        self.look()
        self.run(**(environment if process.returncode else {"PREFECT_API_URL": ""}))  # with nothing to do it needs no server
        self.look()
        assert self.digests() == self.expected
        assert gone(self.mark)
        assert not list((self.workspace.home / "runs").glob("*.lock"))

    def kill(self, target: str, process: subprocess.Popen[str]) -> int:
        """Kill the target with SIGKILL once it exists. Returns the number of killed processes."""
        victims = [process.pid] if target in ("flow", "tree") and process.poll() is None else []
        if target == "tree":
            victims += marked(self.mark)
        elif target != "flow":
            while process.poll() is None and not victims:
                victims = self.programs("watchdog.py") if target == "watchdog" else self.programs("-m tasks", "stand_in.py")
                victims = victims and [self.dice.choice(sorted(victims))]
        count = 0
        while victims:  # of a tree those as well that were being started
            for pid in victims:
                try:
                    os.kill(pid, signal.SIGKILL)
                    count += 1
                except ProcessLookupError:
                    pass
            victims = marked(self.mark) if target == "tree" else []
        return count

    def programs(self, *texts: str) -> list[int]:
        """Return our processes that work on a request and have one of the texts in their command line."""
        lines = {pid: command(pid) for pid in marked(self.mark)}
        return [
            pid
            for pid, line in lines.items()
            if "request.json" in line and any(text in line for text in texts) and ("watchdog.py" in texts or "watchdog.py" not in line)
        ]

    def look(self) -> None:
        """Check that every byte of the store matches its manifest, and that no lock is held once all processes are gone."""
        store: Store = self.workspace.store
        for folder in store.artifacts():
            problem, _ = store.inspect(folder, full=True)
            assert problem is None, f"{folder}: {problem}"
        assert not (store.root / ".quarantine").exists()
        deadline = time.monotonic() + 60  # a dying process loses its memory, and with it its mark, before its files
        for lock in (store.root / ".locks").iterdir():
            with store.locked(lock.name, keep_waiting=lambda: time.monotonic() < deadline):
                pass


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def seed_on_failure(dice_of: str) -> Iterator[random.Random]:
    try:
        yield random.Random(f"{SEED} {dice_of}")
    except BaseException:
        print(f"TORTURE_SEED={SEED} {dice_of}")  # for `make torture SEED=`
        raise


@pytest.mark.slow
def test_stand_ins_killed_at_random(project: Project, stand_in: Callable[..., None], prefect_server: str) -> None:
    project.write(STAND_INS)
    names = ("one", "two", "other", "after")
    for name in names:
        project.write(name, f"{name}.txt")
    stand_in(**{name: ["slow"] * 10 * (KILLS + 1) for name in names})
    with seed_on_failure("stand-ins") as dice:
        torture = Torture(project, "demo", 4, dice)
        while torture.kills < KILLS:
            if torture.kills % 8 == 7:
                torture.kill_and_look(PREFECT_API_URL="")  # with a server of its own, which takes longer to start
            else:
                torture.kill_and_look()
        assert torture.deaths or KILLS < 10


@pytest.mark.slow
@pytest.mark.process
def test_the_pico_pipeline_killed_at_random(tmp_path: Path, pico_run: Project, prefect_server: str) -> None:
    project = copied(pico_run, tmp_path / "project")
    with seed_on_failure("pico") as dice:
        torture = Torture(project, "pico", 2, dice)
        while torture.kills < PICO_KILLS:
            torture.kill_and_look()


# --- kills at a given place, which a random kill would rarely hit ---------------------------------------------------------

PUBLISH = """
import os, shutil, signal, sys
from pathlib import Path
from tuneline import files as written
from tuneline.workspace import store as module
from tuneline.workspace.artifact import Manifest
from tuneline.workspace.store import Store

store, kills = Store(Path(sys.argv[1])), 0

def publish(key, text):
    built = store.staging_dir(key)
    (built / "payload" / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt"):
        (built / "payload" / name).write_text(text * 1000)
    fields = {"parents": {}, "metrics": {}, "info": {}, "host": {}, "document": {}}
    store.publish(built, lambda digest, files: Manifest(kind="merge", type="Model", key=key, digest=digest, files=files, **fields))

def killer(number):
    def trace(frame, event, argument):
        nonlocal number
        if frame.f_code.co_filename not in (module.__file__, written.__file__, shutil.__file__):
            return None
        if event == "line":
            number -= 1
            if not number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    return trace

with store.locked("0" * 64):
    publish("0" * 64, "old")
old = store.find("merge", "0" * 64).digest
for forced in (False, True):
    for number in range(1, 10_000):
        key = f"{number:063x}{forced:x}"
        with store.locked(key):
            if forced:
                publish(key, "old")
            child = os.fork()
            if not child:
                sys.settrace(killer(number))
                publish(key, "new")
                os._exit(0)
            _, status = os.waitpid(child, 0)
        for folder in store.artifacts():
            problem, artifact = store.inspect(folder, full=True)
            assert problem is None, (forced, number, problem)
        if status == 0:
            break
        kills += 1
        there = store.find("merge", key)
        with store.locked(key):
            publish(key, "new")
        again = store.find("merge", key)
        assert there is None or there.digest in (again.digest, old), (forced, number)
        assert (again.payload / "deep" / "b.txt").read_text() == "new" * 1000
        shutil.rmtree(again.path)
print(kills, "kills")
"""
FAULTS = {
    "the manifest half-written": "store.write_atomically = lambda path, text, **_: manifest(path, text, 2)",
    "all written, not yet in its place": "store.write_atomically = lambda path, text, **_: manifest(path, text, 1)",
    "in its place, not yet in the record": "flows.run.run_context.RunContext.note = lambda *_, **__: die()",
}


@pytest.mark.slow
def test_a_publish_killed_at_every_line_leaves_all_or_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUBLISH, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 100


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_killed_while_it_publishes(project: Project, stand_in: Callable[..., None], prefect_server: str, fault: str) -> None:
    project.write(STAND_INS)
    for name in ("one", "two", "other", "after"):
        project.write(name, f"{name}.txt")
    stand_in()
    script = f"""
import os, signal, sys
import flows.__main__, flows.run.stage, flows.run.run_context, tuneline.workspace.store as store
real, die = store.write_atomically, lambda: os.kill(os.getpid(), signal.SIGKILL)

def manifest(path, text, part):
    if path.name != "manifest.json":
        return real(path, text)
    path.write_text(text[: len(text) // part])
    die()

{FAULTS[fault]}
sys.argv = ["tuneline", "run", "demo"]
flows.__main__.main()
"""
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert project.json("show", "demo")["state"] == "killed"
    published = list((project.root / ".tuneline" / "store").glob("dataset/??/*"))
    # Two stages work side by side: both may be there by then.
    assert len(published) in ((1, 2) if fault == "in its place, not yet in the record" else (0,))
    assert [stage["status"] for stage in project.json("run", "demo")["stages"]].count("cached") == len(published)
    assert project.tuneline("verify").stderr == "4 artifacts, 0 damaged\n"
