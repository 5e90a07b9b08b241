"""Begin, find and end a training's run in each tracker. Only `tasks.training.trackers` imports this.

The integrations of Hugging Face log into the run that was begun here. A training that resumes continues its earlier run.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from tuneline.kinds.trackers import Mlflow, Tensorboard, Trackio, Wandb
from tuneline.workspace.tracked import Tracked

START_SECONDS = 30  # that a tracker may take to begin a run
REQUEST_SECONDS = 10  # that a server may take to answer
FLUSH_SECONDS = 2  # by default, the last steps are not in the file for up to two minutes


class TrackerRun(ABC):
    """A training's run in one tracker. `known` has the training's name, and ids from before a resume."""

    package: str
    hint: str

    def __init__(self, settings: Any, known: Tracked, home: Path):
        """`home`: the folder `.tuneline`."""
        self.settings, self.known, self.home = settings, known, home
        self.pipeline = known.name.partition("/")[0]

    @abstractmethod
    def begin(self, args: TrainingArguments, state: TrainerState) -> TrainerCallback:
        """Begin or continue the run, and return the integration that logs into it."""

    @abstractmethod
    def link(self) -> str:
        """Return the address of the run's page, or how to see its curves, once the integration has seen the beginning."""

    def end(self) -> None:  # noqa: B027 - most integrations end their run themselves
        """End the run after the integration has seen the end."""


def integration(name: str) -> Any:
    return get_reporting_integration_callbacks([name])[0]


class TensorboardRun(TrackerRun):
    settings: Tensorboard
    package = "tensorboardX"
    hint = "check that its `log_dir` can be written"

    def begin(self, args: TrainingArguments, state: TrainerState) -> TrainerCallback:
        from tensorboardX import SummaryWriter

        # TensorBoard forgets what a killed process has logged after the checkpoint.
        folder = str(Path(self.settings.log_dir, self.known.name))
        writer = SummaryWriter(folder, purge_step=state.global_step + 1, flush_secs=FLUSH_SECONDS)
        return integration("tensorboard")(writer)

    def link(self) -> str:
        return f"tensorboard --logdir {self.settings.log_dir}"


class WandbRun(TrackerRun):
    settings: Wandb
    package = "wandb"
    hint = "check WANDB_API_KEY and the network, or set `offline: true`"

    def begin(self, args: TrainingArguments, state: TrainerState) -> TrainerCallback:
        os.environ["WANDB_LOG_MODEL"] = os.environ["WANDB_WATCH"] = "false"  # the store has the model; hooks would slow the training
        import wandb

        pipeline, stage, run = self.known.name.split("/")
        wandb.init(
            project=self.settings.project or pipeline,
            entity=self.settings.entity,
            name=self.known.name,
            id=f"{pipeline}-{stage}-{run}",
            resume="allow",
            group=f"{pipeline}/{run}",
            tags=self.settings.tags,
            dir=self.home,
            mode="offline" if self.settings.offline else None,
            settings=wandb.Settings(console="off", silent=True, init_timeout=START_SECONDS),
        )
        return integration("wandb")()

    def link(self) -> str:
        import wandb

        assert wandb.run is not None
        return wandb.run.url or f"wandb sync {Path(wandb.run.dir).parent}"

    def end(self) -> None:
        import wandb

        wandb.finish()


class MlflowRun(TrackerRun):
    settings: Mlflow
    package = "mlflow"
    hint = "check `tracking_uri`, the network and MLFLOW_TRACKING_TOKEN; `mlflow-skinny` is enough"

    def begin(self, args: TrainingArguments, state: TrainerState) -> TrainerCallback:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.pop("MLFLOW_RUN_ID", None)  # of a run that has nothing to do with this training
        import mlflow

        if self.settings.tracking_uri:
            mlflow.set_tracking_uri(self.settings.tracking_uri)
        elif not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError("found neither `tracking_uri` nor MLFLOW_TRACKING_URI, expected the address of a server")
        mlflow.set_experiment(self.settings.experiment or self.pipeline)
        begun = mlflow.start_run(self.known.ids.get("mlflow"), run_name=self.known.name, tags=self.settings.tags)
        self.known.ids["mlflow"] = begun.info.run_id
        self._page = f"/#/experiments/{begun.info.experiment_id}/runs/{begun.info.run_id}"
        return integration("mlflow")()

    def link(self) -> str:
        import mlflow

        address = urlsplit(str(mlflow.get_tracking_uri()))
        return address._replace(netloc=address.netloc.rpartition("@")[2]).geturl().rstrip("/") + self._page

    def end(self) -> None:
        import mlflow

        mlflow.flush_async_logging()
        mlflow.end_run()


class TrackioRun(TrackerRun):
    settings: Trackio
    package = "trackio"
    hint = "check HF_TOKEN and the network, or leave `space` out"

    def begin(self, args: TrainingArguments, state: TrainerState) -> TrainerCallback:
        args.project, args.trackio_space_id = self.settings.project or self.pipeline, self.settings.space
        args.trackio_static_space_id = False  # no second Space, with a copy, at the end
        return integration("trackio")()

    def link(self) -> str:
        if self.settings.space:
            return f"https://huggingface.co/spaces/{self.settings.space}"
        return f"trackio show --project {self.settings.project or self.pipeline}"


RUNS: dict[str, type[TrackerRun]] = {"tensorboard": TensorboardRun, "wandb": WandbRun, "mlflow": MlflowRun, "trackio": TrackioRun}
