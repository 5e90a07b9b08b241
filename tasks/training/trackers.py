"""Report a training to its pipeline's trackers, so that none can end the training or slow it down.

Each tracker has a thread, which passes on copies of what the trainer logs to Hugging Face's integration. A server that does not
answer delays only the end of the training, by SECONDS at most. An error ends the tracker with one warning.

Imports transformers at the top because it subclasses; programs import it inside `run`.
"""

from __future__ import annotations

import copy
import threading
import time
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.training import TRACKER
from tasks.training.tracker_runs import RUNS, TrackerRun
from tuneline.workspace.protocol import Events, Request
from tuneline.workspace.tracked import tracked

SECONDS = 20.0  # for which a finished training waits for all its trackers


class Trackers(TrainerCallback):
    """Passes the logs of the first process on to each tracker of the request."""

    def __init__(self, request: Request, events: Events):
        self.request, self.events = request, events
        self.threads: list[_Tracker] = []
        self.writing = threading.Lock()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if self.request.track is None or not state.is_world_process_zero:
            return
        known = tracked(self.request.work, self.request.name)
        known.write(self.request.work)
        for name, settings in self.request.track.chosen().items():
            run = RUNS[name](settings, known, self.request.work.parent.parent)
            if find_spec(run.package) is None:
                self.events.warning(f"{name}: the stage's runtime has no package `{run.package}`; docs/trackers.md shows how to add it")
                continue
            tracker = _Tracker(name, run, self, copy.copy(args))
            tracker.put("on_train_begin", state, control=control, model=model)
            self.threads.append(tracker)
        for tracker in self.threads:
            tracker.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any) -> None:
        for tracker in self.threads:
            tracker.put("on_log", state, control=control, logs=dict(logs))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        deadline = time.monotonic() + SECONDS
        for tracker in self.threads:
            tracker.put("on_train_end", state, control=control)
        for tracker in self.threads:
            tracker.join(max(0.0, deadline - time.monotonic()))
            if tracker.is_alive():
                tracker.warn(f"it did not take the rest of the curve within {SECONDS:.0f} s")


class _Tracker(threading.Thread):
    """One tracker. Everything happens in its thread, because MLflow's active run, for one, belongs to a thread."""

    def __init__(self, tracker: str, run: TrackerRun, of: Trackers, args: TrainingArguments):
        super().__init__(name=f"{TRACKER}{tracker}", daemon=True)
        self.tracker, self._run, self._of, self._args = tracker, run, of, args
        self._jobs: SimpleQueue[tuple[str, TrainerState, dict[str, Any]]] = SimpleQueue()

    def put(self, event: str, state: TrainerState, **more: Any) -> None:
        self._jobs.put((event, copy.copy(state), more))

    def warn(self, what: str) -> None:
        self._of.events.warning(f"{self.tracker}: {what}; {self._run.hint}")

    def run(self) -> None:
        try:
            self._args.run_name = self._run.known.name
            event, state, more = self._jobs.get()
            integration = self._run.begin(self._args, state)
            integration.on_train_begin(self._args, state, **more)
            self._note(self._run.link())
            while event != "on_train_end":
                event, state, more = self._jobs.get()
                getattr(integration, event)(self._args, state, **more)
            self._run.end()
        except (Exception, SystemExit) as error:  # whatever another library raises
            lines = str(error).strip().splitlines()
            self.warn(f"it shows no more of this training: {type(error).__name__}{f': {lines[0]}' if lines else ''}")

    def _note(self, link: str) -> None:
        print(f"{self.tracker}: {link}", flush=True)
        with self._of.writing:
            self._run.known.links[self.tracker] = link
            self._run.known.write(self._of.request.work)
