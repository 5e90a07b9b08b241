"""Runs one program: `python -m tasks WORK/request.json`, in the runtime's Python, from its own work folder.

Ends with result.json, or with failure.json and exit status 1. Exceptions are classified here, in one place, so that programs raise
`StageFailed` only for failures that they recognize.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import traceback
from pathlib import Path

from tasks.launch import FAILURE_SUFFIX, LOST_PEER, RANKS
from tasks.log_filters import silence
from tasks.models.hardware import computed_on
from tasks.models.loading import check_inputs
from tasks.packages import hidden, hide, import_program
from tasks.training import TRACKER
from tuneline import disk
from tuneline.config.spec import PROGRAM_STAGES
from tuneline.errors import StageFailed
from tuneline.workspace.file_names import EVENTS, FAILURE, RESULT
from tuneline.workspace.protocol import Events, Failure, Request

NETWORK = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "RemoteProtocolError", "LocalEntryNotFoundError")
# Signs of a lost or hanging peer process: torch raises its own classes or, with gloo, errors that only differ by their text.
LOST = ("DistNetworkError", "DistStoreError", "DistBackendError")
PEERS = ("NCCL", "gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
AUTH = ("GatedRepoError", "RepositoryNotFoundError", "DatasetNotFoundError")


def main() -> int:
    request_file = Path(sys.argv[1])
    request = Request.read(request_file)
    folder = request_file.parent
    failure_file = folder / FAILURE
    if (rank := os.environ.get("RANK")) is not None:  # one of several processes: `tasks.launch` reports the failure
        failure_file = folder / RANKS / f"{rank}{FAILURE_SUFFIX}"
        if rank != "0":
            log = os.open(folder / RANKS / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
    silence()
    events = Events(folder / EVENTS)
    for path in (request.payload, request.meta):
        path.mkdir(parents=True, exist_ok=True)
    try:
        check_inputs(request)
        hide(request)
        program = import_program(PROGRAM_STAGES[request.kind])
        result = program.run(request, request.stage(), events)
        if is_first_process():
            result.model_copy(update={"info": {**result.info, **computed_on()}}).write(folder / RESULT)
        return 0
    except BaseException as error:
        failure = classify(error, request)
        if failure.failure_class == "disk":
            shutil.rmtree(request.out, ignore_errors=True)  # makes room for failure.json
        print(failure.details or failure.message, file=sys.stderr, flush=True)
        failure.write(failure_file)
        return 1


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def classify(error: BaseException, request: Request) -> Failure:
    """Map an exception to a failure class, by the type's name if importing its library would take seconds."""
    if isinstance(error, StageFailed):
        return Failure(failure_class=error.failure_class, message=error.message, hint=error.hint, details=error.details)
    names = {cls.__name__ for cls in type(error).__mro__}
    text = f"{type(error).__name__}: {error}"
    details = "".join(traceback.format_exception(error))
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or "can't allocate memory" in str(error):
        return Failure(failure_class="oom", message=text, hint="the stage is tried again with half the micro-batch", details=details)
    if disk.is_of_disk(error):
        failed = disk.of_program(error, request.out, request.work)
        return Failure(failure_class="disk", message=failed.message, hint=failed.hint, details=details)
    if names & set(AUTH):
        hint = "check the name, ask for access on the hub, and set HF_TOKEN"
        return Failure(failure_class="auth", message=str(error).strip().splitlines()[0], hint=hint, details=details)
    if names & set(LOST) or any(sign in str(error) for sign in PEERS):
        return Failure(failure_class="transient", message="another process did not answer", hint=LOST_PEER, details=details)
    if names & set(NETWORK) or isinstance(error, ConnectionError | TimeoutError):
        return Failure(failure_class="transient", message=text, hint="the stage is tried again", details=details)
    hint = "see the log for the traceback"
    if isinstance(error, ImportError) and hidden():
        hint += f"; tasks/packages.py hides {', '.join(hidden())} from this stage"
    return Failure(failure_class="bug", message=text, hint=hint, details=details)


if __name__ == "__main__":
    status = main()
    left = any(thread.name.startswith(TRACKER) for thread in threading.enumerate())  # would wait for its server as long as that takes
    if "RANK" in os.environ or left:  # threads of gloo and DeepSpeed sometimes abort the interpreter's exit; all results are written
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
