"""`tuneline up`, `down`, `worker` and `doctor`, with real servers, workers and databases: starting, finding again, and ending them."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lasting import PIPELINES, Lasting
from processes import PATIENCE, gone, marked, until
from project import ROOT, Project

from flows.doctor.machine import file_system, locks_work
from flows.server import server_state
from flows.server.connect import find_server, free_port
from flows.server.up import _without_secrets
from flows.server.workers import _without_gpus
from tuneline.config.load import load

pytestmark = pytest.mark.usefixtures("no_server_of_the_session")

DEPLOY = """
from prefect.deployments.runner import EntrypointType
from flows.pipeline import run_pipeline
d = run_pipeline.with_options(name="demo").to_deployment(
    name="demo", parameters={"pipeline": "demo", "file": "%s"}, work_pool_name="here", tags=["tuneline"], entrypoint_type=EntrypointType.MODULE_PATH)
d.entrypoint = "flows.pipeline.run_pipeline"
d.apply()
"""


@pytest.fixture(scope="module")
def lasting_up(tmp_path_factory: pytest.TempPathFactory, no_server_of_the_session: None) -> Iterator[Lasting]:
    it = Lasting(tmp_path_factory.mktemp("up"), auth="me:a secret")
    try:
        it.up()
        yield it
    finally:
        it.end()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Lasting]:
    it = Lasting(tmp_path)
    yield it
    it.end()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def problem(problems: dict[str, Any], check: str) -> tuple[str, str, str]:
    found = next(entry for entry in problems["findings"] if entry["check"].startswith(check))
    return found["status"], found["message"], found["remedy"]


def doctor(it: Lasting, *arguments: str) -> dict[str, Any]:
    process = it.project.start("doctor", "--json", *arguments)
    out, err = process.communicate(timeout=PATIENCE)
    found: dict[str, Any] = json.loads(out)
    assert process.returncode == (1 if found["problems"] else 0), err
    return found


# --- without a server -----------------------------------------------------------------------------------------------------


def test_a_number_given_to_another_process_is_not_ours(tmp_path: Path) -> None:
    me = server_state.process(os.getpid())
    assert me.alive
    assert not server_state.Process(pid=me.pid, started=me.started + 1).alive
    (tmp_path / "server").mkdir()
    for server in (me, server_state.Process(pid=me.pid, started=me.started + 1)):
        state = server_state.State(address="http://127.0.0.1:9/api", database=None, server=server)
        server_state.write(tmp_path / "server", state)
        assert server_state.read(tmp_path / "server") == state
        assert find_server(tmp_path) is None  # nothing answers, or the server is gone
    (tmp_path / "server" / "state.json").write_text("{")
    assert find_server(tmp_path) is None


def test_a_dead_child_that_nobody_has_collected_is_dead() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    process = server_state.process(child.pid)
    assert process.alive
    child.kill()
    until(lambda: not process.alive)
    child.wait()


@pytest.mark.parametrize(
    ("database", "shown"),
    [
        ("postgresql+asyncpg://me:secret@db:5432/prefect", "postgresql+asyncpg://db:5432/prefect"),
        ("postgresql+asyncpg://me:se/cr?et@x@db/prefect?password=secret", "postgresql+asyncpg://db/prefect"),
        ("sqlite+aiosqlite:////data/prefect.db", "sqlite+aiosqlite:////data/prefect.db"),
    ],
)
def test_of_a_database_neither_user_nor_password_is_shown(database: str, shown: str) -> None:
    assert _without_secrets(database) == shown


def test_down_where_nothing_is_up_says_so(fresh: Lasting) -> None:
    assert fresh.project.tuneline("down").stderr == "nothing is up\n"
    assert fresh.project.json("down") == {"ended": []}


def test_a_port_in_use_is_said(fresh: Lasting) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", fresh.port))
        taken.listen()
        stderr = fresh.project.tuneline("up", "--port", str(fresh.port), status=2).stderr
    assert f"--port: found {fresh.port}, which cannot be bound (Address already in use), expected a free port" in stderr
    assert stderr.endswith(f"hint: `tuneline up --port {fresh.port + 1}`, or stop the process that uses it\n")
    assert server_state.read(fresh.folder) is None


CALLS = [
    (["up", "--database", "postgresql://me:secret@db/prefect"], "--database: found an address that begins with `postgresql`, expected postgresql+asyncpg://user@host/name or sqlite+aiosqlite:////folder/file.db\n"),
    (["up", "--database", "mine"], "--database: found an address that begins with `mine`, expected postgresql+asyncpg://user@host/name or sqlite+aiosqlite:////folder/file.db\n"),
    (["up", "--port", "0"], "Invalid value for '--port': 0 is not in the range 1<=x<=65535.\n\nhint: `tuneline up --help`\n"),
    (["worker", "her"], "worker: found no pool `her`, expected here, there\n\nhint: did you mean `here`?\n"),
    (["worker", "there"], "PREFECT_API_URL: found no address of a Prefect server, and no running server of `tuneline up`\n\nhint: `tuneline up` starts one\n"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), CALLS, ids=[" ".join(arguments) for arguments, _ in CALLS])
def test_a_wrong_call_is_told(fresh: Lasting, arguments: list[str], message: str) -> None:
    assert fresh.project.tuneline(*arguments, status=2).stderr == message


def test_another_server_in_the_environment_is_told(fresh: Lasting) -> None:
    stderr = fresh.project.tuneline("up", status=2, PREFECT_API_URL="http://127.0.0.1:9/api").stderr
    assert stderr.startswith("PREFECT_API_URL: found http://127.0.0.1:9/api: runs would use that server, not the one of `up`")


def test_a_container_worker_needs_its_library(fresh: Lasting) -> None:
    fresh.project.write(PIPELINES.replace("{type: process, local: false}", "{type: docker, image: mine}"))
    program = (
        "import sys; sys.modules['prefect_docker'] = None; sys.argv[1:] = ['worker', 'there']\nfrom flows.commands.main import main\nmain()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=fresh.project.root, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "worker: there: found no prefect-docker, which a docker worker needs\n\nhint: `pip install prefect-docker`"
    )


def test_the_doctor_without_a_server_imports_no_prefect_and_says_what_is_wrong(fresh: Lasting) -> None:
    program = "import sys; sys.argv[1:] = ['doctor', '--json']\nfrom flows.commands.main import main\ntry: main()\nexcept SystemExit as end: print(end.code, *sys.modules, file=sys.stderr)"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_never_shown"}
    done = subprocess.run([sys.executable, "-c", program], cwd=fresh.project.root, env=env, capture_output=True, text=True)
    status, *modules = done.stderr.split()
    assert (status, "prefect" in modules, "httpx" in modules) == ("0", False, False), done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == 0
    assert "hf_never_shown" not in done.stdout
    assert problem(found, "HF_TOKEN") == ("ok", "it is set", "")
    assert problem(found, "server") == ("warning", "no server is running, so no worker serves the pools (here, there)", "tuneline up")
    shared = problem(found, "shared work")
    assert shared[0] == ("ok" if "is shared" in shared[1] else "warning")
    assert problem(found, "prefect")[0] == "ok"


@pytest.mark.process
def test_the_doctor_names_each_problem_with_its_remedy(fresh: Lasting) -> None:
    root = fresh.project.root
    text = PIPELINES.replace("{stand-in: {python: bin/python}}", "{stand-in: {lock: lock.txt}}").replace(
        "one.txt}]}", "one.txt}], resources: {gpus: 1}}"
    )
    fresh.project.write(f"store: /nowhere/at/all\n{text}")
    fresh.project.write("pydantic==2.0\n", "lock.txt")
    (root / ".tuneline" / "runtimes" / "stand-in-0123456789ab").mkdir(parents=True)
    newer = root / "packages" / "fastapi-0.165.0.dist-info"  # found first, as an upgrade would be
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: fastapi\nVersion: 0.165.0\n")
    environment = {
        "PYTHONPATH": f"{root / 'packages'}:{ROOT}",
        "CUDA_VISIBLE_DEVICES": "",
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "TUNELINE_RUNTIMES": "",
    }
    found = fresh.project.json("doctor", status=1, **environment)
    assert problem(found, "runtime stand-in") == ("problem", "its lock has changed since it was set up", "tuneline setup stand-in")
    status, message, remedy = problem(found, "fastapi")
    assert (status, message.split(",")[0], remedy.split("'")[0]) == ("problem", "0.165.0 is installed", "pip install ")
    assert problem(found, "store") == ("problem", "there is no folder /nowhere/at", "mkdir /nowhere/at, or mount its disk")
    assert problem(found, "gpus") == (
        "warning",
        "0 seen, stages ask for up to 1 (demo.one, in the pool here of this machine)",
        "`local: false` for the pool here, and `tuneline worker here` where the GPUs are",
    )
    assert problem(found, "server")[:2][0] == "problem"
    assert found["problems"] == 4
    table = fresh.project.tuneline("doctor", status=1, **environment).stdout
    assert "tuneline setup stand-in" in table


def test_a_worker_that_starts_where_its_gpus_are_not_is_told(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(project.write(PIPELINES.replace("one.txt}]}", "one.txt}], resources: {gpus: 1}}")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _without_gpus(loaded, "here") == " (warning: demo.one asks for 1 GPU, this machine shows 0: see `tuneline doctor`)"
    assert _without_gpus(loaded, "there") == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert _without_gpus(loaded, "here") == ""


def test_locks_and_file_systems_are_looked_at(tmp_path: Path) -> None:
    assert locks_work(tmp_path)
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(tmp_path / "not" / "yet") == file_system(tmp_path)


# --- with one -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_up_serves_its_ui_on_loopback_and_a_second_up_says_that_it_is_up(lasting_up: Lasting) -> None:
    state = server_state.read(lasting_up.folder)
    assert state is not None
    assert (state.port, list(state.workers)) == (lasting_up.port, ["here"])
    with urllib.request.urlopen(f"{state.ui}/ui-settings", timeout=30) as answer:
        assert json.load(answer)["api_url"] == lasting_up.address
    sockets = [line.split() for line in Path(f"/proc/{state.server.pid}/net/tcp").read_text().splitlines()[1:]]
    listening = [local for _, local, _, state_of_it, *_ in sockets if local.endswith(f":{lasting_up.port:04X}") and state_of_it == "0A"]
    assert listening == [f"0100007F:{state.port:04X}"]
    for process in (state.server, state.workers["here"]):
        environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        assert {b"PREFECT_SERVER_ANALYTICS_ENABLED=false", b"DO_NOT_TRACK=1", f"PREFECT_HOME={lasting_up.folder}".encode()} <= set(
            environment
        )
        assert os.getsid(process.pid) == process.pid  # no terminal's end reaches it
    again = lasting_up.project.tuneline("up")
    assert again.stdout == f"{state.ui}\n"
    assert again.stderr.startswith("already running;")
    assert server_state.read(lasting_up.folder) == state
    lasting_up.project.write(PIPELINES.replace("{type: process, local: false}", "{type: docker, image: mine}"), "docker.yaml")
    worker = lasting_up.project.tuneline("worker", "there", "--file", "docker.yaml", status=2)
    assert (
        worker.stderr == f"worker: there: found no such pool on the server at {lasting_up.address}\n\nhint: `tuneline deploy` creates it\n"
    )
    other = lasting_up.project.tuneline("up", "--port", str(lasting_up.port + 1), status=2)
    assert other.stderr.startswith(f"--port: found {lasting_up.port + 1}, but the server of `up` runs on port {lasting_up.port}")
    database = lasting_up.project.tuneline("up", "--database", "postgresql+asyncpg://me:secret@db/prefect", status=2)
    assert database.stderr.startswith(
        "--database: found postgresql+asyncpg://db/prefect, but the server that `up` started has a file of its own"
    )
    assert "secret" not in database.stderr


@pytest.mark.slow
def test_a_worker_that_died_is_started_again_and_one_for_a_new_pool(lasting_up: Lasting) -> None:
    def state() -> server_state.State:
        found = server_state.read(lasting_up.folder)
        assert found is not None
        return found

    before = state()
    os.kill(before.workers["here"].pid, signal.SIGKILL)
    until(lambda: state().workers["here"] != before.workers["here"])
    assert state().workers["here"].alive
    lasting_up.project.write("pipelines: [", "pipelines.yaml")  # half edited
    lasting_up.project.write(PIPELINES.replace("  there:", "  more:  {type: process}\n  there:"))
    until(lambda: "more" in state().workers)
    after = state()
    assert (after.server, after.keeper) == (before.server, before.keeper)
    assert lasting_up.up()["started"] == []
    assert problem(doctor(lasting_up), "pool more") == ("ok", f"works on {socket.gethostname()}", "")
    lasting_up.prefect("-m", "prefect", "work-pool", "pause", "more")
    found = doctor(lasting_up)
    assert problem(found, "pool more") == ("warning", "it is paused: its runs do not start", "prefect work-pool resume more")
    assert problem(found, "pool there") == ("problem", "the server does not know it", "tuneline deploy")

    # Without its keeper, which `up` brings back.
    assert after.keeper is not None
    for process in (after.keeper, after.workers["here"]):
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: not after.workers["here"].alive)
    assert problem(doctor(lasting_up), "pool here") == ("problem", "the worker that `up` started has ended", "tuneline up")
    assert lasting_up.up()["started"] == ["worker here"]
    assert state().keeper != after.keeper
    lasting_up.project.write(PIPELINES)  # a pool that left the file needs no worker, which would make it again
    assert lasting_up.up()["started"] == []
    assert set(state().workers) == {"here"}
    assert not after.workers["more"].alive


@pytest.mark.slow
def test_a_worker_of_another_machine_works_in_the_foreground_until_it_is_told_to_end(lasting_up: Lasting) -> None:
    worker = lasting_up.project.start("worker", "there", PREFECT_API_URL=lasting_up.address, MARK=lasting_up.mark)
    try:
        until(lambda: "there" in [pool["name"] for pool in lasting_up.ask("work_pools/filter", {})])
        until(lambda: lasting_up.ask("work_pools/there/workers/filter", {}))
        assert problem(doctor(lasting_up), "pool there") == ("ok", f"works on {socket.gethostname()}", "")
    finally:
        worker.send_signal(signal.SIGTERM)
        out, err = worker.communicate(timeout=PATIENCE)
    assert "Worker" in out + err


@pytest.mark.slow
def test_a_run_goes_there_and_its_page_is_told(lasting_up: Lasting) -> None:
    ran = lasting_up.project.tuneline("run", "demo")
    page = next(line for line in ran.stderr.splitlines() if line.startswith("page: ")).removeprefix("page: ")
    assert page.startswith(f"http://127.0.0.1:{lasting_up.port}/runs/flow-run/")
    with urllib.request.urlopen(urllib.request.Request(page, headers={"Accept": "text/html"}), timeout=30) as answer:
        assert answer.headers.get_content_type() == "text/html"
    run = lasting_up.ask(f"flow_runs/{page.rpartition('/')[2]}")
    assert (run["state"]["type"], set(run["tags"])) == ("COMPLETED", {"tuneline", "demo", "nightly"})
    cached = lasting_up.project.tuneline("run", "demo")
    assert "page: " in cached.stderr
    assert "starting Prefect" not in cached.stderr
    states = lasting_up.ask("flow_runs/filter", {"flow_runs": {"tags": {"all_": ["tuneline", "demo"]}}})
    assert [run["state"]["name"] for run in states] == ["Completed", "Completed"]


@pytest.mark.slow
def test_the_doctor_finds_runs_whose_process_is_gone_and_tells_the_server(lasting_up: Lasting) -> None:
    state = server_state.read(lasting_up.folder)
    assert state is not None
    assert state.keeper is not None
    with stopped(state.keeper.pid):  # it would report the end before the doctor does
        lasting_up.project.write("dead", "one.txt")
        lasting_up.script(one=["sleep"] * 9)
        process = lasting_up.project.start("run", "demo", MARK=lasting_up.mark)
        until(lambda: (lasting_up.project.root / "sleeping-one").exists())
        page = next(line for line in iter(process.stderr.readline, "") if line.startswith("page: ")).strip()  # type: ignore[union-attr]
        identity = page.rpartition("/")[2]
        newest = lasting_up.project.root / ".tuneline" / "runs" / f"{lasting_up.project.json('runs')[0]['run_id']}.json"
        older = newest.with_name("20260101T000000000Z-abcd.json")  # of before a Retry: the same run in Prefect
        ended = {"run_id": older.stem, "state": "failed", "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:00+00:00"}
        older.write_text(json.dumps(json.loads(newest.read_text()) | ended))
        assert not any(identity in entry["check"] for entry in doctor(lasting_up, "--fix")["findings"])
        older.unlink()
        process.kill()
        process.communicate(timeout=PATIENCE)
        found = problem(doctor(lasting_up), "run demo")
        assert found[0] == "problem"
        assert found[1].startswith("Running on the server, but its process is gone")
        assert found[2] == "tuneline doctor --fix"
        assert problem(doctor(lasting_up, "--fix"), "run demo")[1].endswith("now Crashed there")
        assert lasting_up.ask(f"flow_runs/{identity}")["state"]["type"] == "CRASHED"
        assert problem(doctor(lasting_up), "runs") == ("ok", "no run hangs", "")


@pytest.mark.slow
def test_the_keeper_reports_the_end_of_a_run_that_was_killed(lasting_up: Lasting) -> None:
    lasting_up.project.write(f"one {os.urandom(4).hex()}", "one.txt")
    (lasting_up.project.root / "sleeping-one").unlink(missing_ok=True)
    (lasting_up.project.root / "calls-one").unlink(missing_ok=True)
    lasting_up.script(one=["sleep"])
    process = lasting_up.project.start("run", "demo")
    until((lasting_up.project.root / "sleeping-one").exists, process)
    flow_run = lasting_up.project.json("runs")[0]["flow_run"]
    time.sleep(6)  # until the keeper has seen it alive, which nothing shows
    process.kill()
    process.communicate()
    until(lambda: lasting_up.ask(f"flow_runs/{flow_run}")["state"]["name"] == "Crashed")
    assert "its process is gone" in lasting_up.ask(f"flow_runs/{flow_run}")["state"]["message"]
    assert problem(doctor(lasting_up), "runs") == ("ok", "no run hangs", "")


@pytest.mark.slow
def test_a_run_that_waits_too_long_is_found(lasting_up: Lasting) -> None:
    flow = lasting_up.ask("flows/", {"name": "demo"})["id"]
    run = lasting_up.ask("flow_runs/", {"flow_id": flow, "name": "stuck", "tags": ["tuneline"], "state": {"type": "PENDING"}})["id"]
    with sqlite3.connect(lasting_up.folder / "prefect.db") as database:  # what the server would not believe
        database.execute("UPDATE flow_run_state SET timestamp = '2026-01-01 00:00:00.000000' WHERE flow_run_id = ?", (run,))
    status, message, remedy = problem(doctor(lasting_up), f"run stuck {run}")
    assert (status, message.endswith("it holds a slot of its pool"), remedy) == ("problem", True, f"prefect flow-run cancel {run}")
    lasting_up.prefect("-m", "prefect", "--no-prompt", "flow-run", "delete", run)


@pytest.mark.slow
def test_a_server_with_a_password_says_so_to_who_has_another(lasting_up: Lasting) -> None:
    """All other tests here use the right password, from the file of `up --auth`."""
    assert (lasting_up.folder / "auth").stat().st_mode & 0o777 == 0o600
    stderr = lasting_up.project.tuneline("up", "--auth", status=2, PREFECT_SERVER_API_AUTH_STRING="me:another").stderr
    assert stderr.startswith("--auth: found a password, but the server that `up` started uses another one, or none")
    elsewhere = Project(lasting_up.project.root / "elsewhere")
    elsewhere.write(PIPELINES)
    for given, found in (({}, "none"), ({"PREFECT_API_AUTH_STRING": "me:another"}, "another one")):
        stderr = elsewhere.tuneline("status", status=2, PREFECT_API_URL=lasting_up.address, **given).stderr
        wanted = f"PREFECT_API_AUTH_STRING: found {found}, expected the one that {lasting_up.address} requires (HTTP 401)"
        assert stderr == f"{wanted}\n\nhint: `export PREFECT_API_AUTH_STRING=user:password`\n"
    elsewhere.tuneline("status", PREFECT_API_URL=lasting_up.address, PREFECT_API_AUTH_STRING="me:a secret")


@pytest.mark.slow
def test_after_kill_9_of_the_server_up_works_again_with_the_same_history(lasting_up: Lasting) -> None:
    before = server_state.read(lasting_up.folder)
    assert before is not None
    runs = len(lasting_up.ask("flow_runs/filter", {}))
    os.kill(before.server.pid, signal.SIGKILL)
    until(lambda: not before.server.alive)
    assert find_server(lasting_up.folder.parent) is None
    stderr = lasting_up.project.tuneline("status").stderr
    assert stderr.startswith("warning: the server that `up` started has ended: `tuneline up` starts it again, with its history\n")
    found = doctor(lasting_up)
    assert problem(found, "server") == ("problem", "the server that `up` started has ended", "tuneline up")
    assert lasting_up.project.json("up")["started"] == ["server"]  # on the port where its workers look for it
    after = server_state.read(lasting_up.folder)
    assert after is not None
    assert (after.port, after.workers) == (before.port, before.workers)
    assert after.server != before.server
    assert len(lasting_up.ask("flow_runs/filter", {})) == runs


@pytest.mark.slow
def test_down_ends_a_run_in_order_and_leaves_nothing(lasting_up: Lasting) -> None:
    root = lasting_up.project.root
    (root / "sleeping-one").unlink(missing_ok=True)
    lasting_up.project.write("under a worker", "one.txt")
    lasting_up.script(one=["sleep"] * 99)
    lasting_up.up()
    lasting_up.prefect("-c", DEPLOY % (root / "pipelines.yaml"))
    lasting_up.prefect("-m", "prefect", "deployment", "run", "demo/demo")
    until(lambda: (root / "sleeping-one").exists())
    ended = lasting_up.project.json("down")["ended"]
    assert gone(lasting_up.mark)
    assert sorted(entry["role"] for entry in ended) == ["run", "server", "worker here"]
    run = next(entry["flow_run"] for entry in ended if entry["role"] == "run")
    assert not (lasting_up.folder / "state.json").exists()
    assert lasting_up.project.json("show", "demo")["state"] == "cancelled"
    assert lasting_up.project.tuneline("down").stderr == "nothing is up\n"
    lasting_up.up()
    assert lasting_up.ask(f"flow_runs/{run}")["state"]["type"] == "CANCELLED"


# --- Postgres -------------------------------------------------------------------------------------------------------------

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@pytest.fixture
def postgres() -> Iterator[str]:
    """Return the address of a new database, with user and password."""
    if not BINARIES:
        pytest.skip("Postgres is not installed (Debian's package `postgresql`)")
    root = os.geteuid() == 0
    if root and "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip("Postgres does not run as root, and there is no user `postgres`")
    unprivileged, binaries, port = (["runuser", "-u", "postgres", "--"] if root else []), BINARIES[-1].parent, free_port()
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # which that user can enter, unlike pytest's
    (folder / "password").write_text("secret-of-the-database")
    if root:
        shutil.chown(folder, "postgres")
        shutil.chown(folder / "password", "postgres")
    data, process = str(folder / "data"), None
    try:
        made = [*unprivileged, str(binaries / "initdb"), "-D", data, "-U", "prefect", "--auth=scram-sha-256", f"--pwfile={folder}/password"]
        subprocess.run([*made, "--no-sync", "--locale=C", "-E", "UTF8"], check=True, capture_output=True, cwd="/")
        listen = ["-c", "listen_addresses=127.0.0.1", "-p", str(port), "-k", str(folder), "-c", "fsync=off"]
        process = subprocess.Popen(
            [*unprivileged, str(binaries / "postgres"), "-D", data, *listen], cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        ready = [str(binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        until(lambda: subprocess.run(ready, capture_output=True).returncode == 0)
        yield f"postgresql+asyncpg://prefect:secret-of-the-database@127.0.0.1:{port}/postgres"
    finally:
        if process:
            subprocess.run([*unprivileged, str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "stop"], capture_output=True, cwd="/")
            process.wait(30)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_history_lies_in_postgres_and_its_password_nowhere_else(fresh: Lasting, postgres: str) -> None:
    state = fresh.up(PREFECT_SERVER_DATABASE_CONNECTION_URL=postgres)
    assert state["database"] == "postgresql+asyncpg://" + postgres.partition("@")[2]
    assert fresh.project.json("run", "demo")["state"] == "completed"
    assert [run["state"]["type"] for run in fresh.ask("flow_runs/filter", {})] == ["COMPLETED"]
    assert not (fresh.folder / "prefect.db").exists()
    secret = b"secret-of-the-database"
    for pid in marked(fresh.mark):
        assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert (secret in Path(f"/proc/{pid}/environ").read_bytes()) == (pid == state["server"]["pid"])
    assert fresh.project.tuneline("up").stderr.startswith("already running;")
    os.kill(state["server"]["pid"], signal.SIGKILL)
    until(lambda: not server_state.Process(**state["server"]).alive)
    lost = fresh.project.tuneline("up", status=2).stderr  # rather than start another history
    assert lost.startswith(f"--database: found none, but the server that `up` started has {state['database']}")
    wrong = fresh.project.tuneline(
        "up", status=1, PREFECT_SERVER_DATABASE_CONNECTION_URL=postgres.replace("secret-of", "another-secret-of")
    )
    assert "the Prefect server did not start" in wrong.stderr
    assert "secret-of-the-database" not in wrong.stderr
    assert fresh.up(PREFECT_SERVER_DATABASE_CONNECTION_URL=postgres)["started"] == ["server"]
    assert len(fresh.ask("flow_runs/filter", {})) == 1
    fresh.project.tuneline("down")
    assert gone(fresh.mark)
    for file in fresh.folder.rglob("*"):
        assert not file.is_file() or secret not in file.read_bytes(), file


@pytest.mark.slow
def test_a_project_that_is_moved_while_it_is_up_leaves_no_process_and_writes_nothing_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    it, new = Lasting(tmp_path / "old"), Lasting.__new__(Lasting)
    new.__dict__ |= {**it.__dict__, "project": Project(tmp_path / "new"), "folder": server_state.folder_of(tmp_path / "new")}
    try:
        it.up()
        shutil.copytree(it.project.root, tmp_path / "copy")
        assert server_state.read(tmp_path / "copy" / ".tuneline" / "server") is None
        assert Project(tmp_path / "copy").tuneline("down").stderr == "nothing is up\n"
        assert server_state.read(it.folder)
        it.project.root.rename(new.project.root)
        assert gone(it.mark)
        assert "is gone: the project was moved or deleted" in (new.folder / "keeper.log").read_text()
        assert not it.project.root.exists()
        assert problem(doctor(new), "server")[1:] == ("the server that `up` started has ended", "tuneline up")

        # Without its keeper, nothing ends it but the next `up` or `down`.
        new.up()
        state = server_state.read(new.folder)
        assert state is not None
        assert state.keeper is not None
        os.kill(state.keeper.pid, signal.SIGKILL)
        new.project.root.rename(it.project.root)
        assert problem(doctor(it), "server")[1:] == (
            f"`up` started it when this folder was {new.project.root}: it writes there",
            "tuneline up, which ends it and starts another",
        )
        assert find_server(it.project.root / ".tuneline") is None
        assert f"writes where this folder was ({new.project.root})" in it.project.tuneline("status").stderr
        assert it.up()["started"] == ["server", "worker here"]
        assert not state.server.alive
        state = server_state.read(it.folder)
        assert state is not None
        assert state.keeper is not None
        os.kill(state.keeper.pid, signal.SIGKILL)
        it.project.root.rename(new.project.root)
        assert {process["role"] for process in new.project.json("down")["ended"]} == {"server", "worker here"}
        assert gone(it.mark)
        assert not it.project.root.exists()
    finally:
        for each in (it, new):
            if each.project.root.exists():
                each.end()
