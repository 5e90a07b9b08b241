"""Trackers of a pipeline's trainings: services and files that show curves. None of it is in any key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.fields import Repository, Strict

Text = Annotated[str, Field(min_length=1)]
ADDRESSES = ("http", "https")  # schemes of MLflow servers; a relative file would be lost with the stage's work folder


class Tensorboard(Strict):
    """Event files for TensorBoard. `tensorboard --logdir .tuneline/tensorboard` shows them."""

    log_dir: Text = ".tuneline/tensorboard"
    """Folder of the event files, relative to pipelines.yaml. Each training has a folder in it: PIPELINE/STAGE/RUN."""


class Wandb(Strict):
    """Weights & Biases. Reads its token from `WANDB_API_KEY`, and the address of a server of your own from `WANDB_BASE_URL`."""

    project: Text | None = None
    """Project; by default the pipeline's name."""
    entity: Text | None = None
    """User or team that the project belongs to; by default the token's own."""
    tags: tuple[Text, ...] = ()
    """Tags of the run."""
    offline: bool = False
    """Keep the run in `.tuneline/wandb`, from where `wandb sync` uploads it, and use no network."""


class Mlflow(Strict):
    """MLflow. Reads its token from `MLFLOW_TRACKING_TOKEN`, or a name and password from `MLFLOW_TRACKING_USERNAME` and
    `MLFLOW_TRACKING_PASSWORD`."""

    tracking_uri: Text | None = None
    """Address of the server, such as `http://mlflow.lan:5000`, or `databricks`; by default that in `MLFLOW_TRACKING_URI`."""
    experiment: Text | None = None
    """Experiment, which is created if it does not exist; by default the pipeline's name."""
    tags: dict[Text, str] = {}
    """Tags of the run."""

    def problems(self) -> Iterator[Problem]:
        parts = urlsplit(self.tracking_uri or "")
        if self.tracking_uri and parts.scheme not in ADDRESSES and not self.tracking_uri.startswith("databricks"):
            found = f"found `{self.tracking_uri}`, expected the address of a server, such as http://localhost:5000, or databricks"
            yield Problem("tracking_uri", found, "`mlflow server` starts one; for files without a server, use `tensorboard: {}`")
        if parts.password:
            found = "found a password in the address, expected none: it would be visible in requests and reports"
            yield Problem("tracking_uri", found, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment")


class Trackio(Strict):
    """Trackio, which keeps runs on this machine (`trackio show`) or in a Space of the hub. Reads the hub's token from `HF_TOKEN`."""

    project: Text | None = None
    """Project; by default the pipeline's name."""
    space: Repository | None = None
    """Space that shows the project, which is created if it does not exist; by default none."""


class Track(Strict):
    """Trackers that every training of the pipeline reports to, by Hugging Face's integrations. No tracker can fail a training."""

    tensorboard: Tensorboard | None = None
    """Event files for TensorBoard."""
    wandb: Wandb | None = None
    """Weights & Biases."""
    mlflow: Mlflow | None = None
    """MLflow."""
    trackio: Trackio | None = None
    """Trackio."""

    def chosen(self) -> dict[str, Any]:
        """Return the settings of the trackers that are named, by name."""
        return {name: settings for name in type(self).model_fields if (settings := getattr(self, name)) is not None}

    def problems(self) -> Iterator[Problem]:
        for name in sorted(self.model_fields_set - self.chosen().keys()):
            yield Problem(name, "found nothing, expected the settings of the tracker", f"write `{name}: {{}}` for the defaults")
        if not self.model_fields_set:
            yield Problem("", f"found no tracker, expected {', '.join(type(self).model_fields)}", "write for example `tensorboard: {}`")
        if self.mlflow:
            for problem in self.mlflow.problems():
                yield Problem(f"mlflow.{problem.field}", problem.message, problem.hint)
        if self.tensorboard and "://" in self.tensorboard.log_dir:
            found = f"found `{self.tensorboard.log_dir}`, expected a folder"
            yield Problem("tensorboard.log_dir", found, "mount the storage and name its folder")
