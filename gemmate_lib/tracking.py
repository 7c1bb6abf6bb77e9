"""Trackers: who is told of a run while it trains. One that fails never fails the training."""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemmate_lib.settings import Experiment, GemmateError, TrackingConfig

log = logging.getLogger("gemmate")
Upload = Callable[[Any, str, str], Any]
# How a folder is handed to those that take more than numbers: callback, folder, name.
UPLOADS: dict[str, Upload] = {
    "trackio": lambda told, folder, name: told._trackio.log_artifact(
        Path(folder), name=name, type="model"
    ),
    "wandb": lambda told, folder, name: told._wandb.run.log_artifact(
        folder, name=name, type="model"
    ),
    "mlflow": lambda told, folder, name: told._ml_flow.log_artifacts(folder, name),
}


class Tracking:
    """Hands each event of the training to a tracker's own callback, until that one fails.

    callback: transformers' callback for the tracker, such as TrackioCallback.
    """

    def __init__(self, callback: Any, settings: TrackingConfig) -> None:
        self._callback, self._settings = callback, settings
        self._lengths: dict[str, float] = {}
        self.more: Callable[[], dict[str, float]] = dict  # what else is told with a record

    def __getattr__(self, event: str) -> Callable[..., None]:
        """The events of a callback, `on_log` and so on, as the trainer calls them."""
        if not event.startswith("on_"):
            raise AttributeError(event)
        return partial(self._tell, event)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure what is watched, at the first step and every log_frequency steps from there."""
        if self._callback is not None and state.global_step % self._settings.log_frequency == 0:
            self._lengths = lengths(given["model"], self._settings.watch_mode)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Tell one record of the log, and what was measured in its step."""
        logs = (given.pop("logs", None) or {}) | self._lengths | self.more()
        self._lengths = {}
        self._tell("on_log", args, state, control, logs=logs, **given)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin, and hand over the tags where there is no other way to."""
        self._tell("on_train_begin", args, state, control, **given)
        if self._settings.tracker == "trackio" and self._settings.tags:
            tags = {"tags": [*self._settings.tags]}
            self._guard(lambda told: told._trackio.config.update(tags))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Hand over what was trained, where that is asked for, and end."""
        if self._settings.upload_model:
            self._guard(lambda told: self._upload(told, given["model"], f"{args.run_name}-model"))
        self._tell("on_train_end", args, state, control, **given)

    def _upload(self, told: Any, model: Any, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            UPLOADS[self._settings.tracker](told, folder, name)

    def _tell(self, event: str, *given: Any, **named: Any) -> None:
        self._guard(lambda told: getattr(told, event)(*given, **named))

    def _guard(self, work: Callable[[Any], Any]) -> None:
        if self._callback is None:
            return
        try:
            work(self._callback)
        except Exception as error:
            name, self._callback = self._settings.tracker, None
            log.warning("The tracker %s failed and is told nothing more: %s", name, error)


def lengths(model: Any, mode: str) -> dict[str, float]:
    """The 2-norm of each trained tensor, of its gradient (after clipping), or of both."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    found: dict[str, torch.Tensor] = {}
    if mode in ("gradients", "all"):
        found |= {f"gradients/{name}": p.grad.norm() for name, p in trained.items()}
    if mode in ("parameters", "all"):
        found |= {f"parameters/{name}": p.detach().norm() for name, p in trained.items()}
    return {name: float(value) for name, value in found.items()}


def check_tracker(settings: TrackingConfig) -> None:
    """Raise GemmateError where the tracker is not installed, or cannot do what is asked of it."""
    if settings.tracker == "none":
        return
    from transformers.integrations import get_available_reporting_integrations

    found = get_available_reporting_integrations()
    if settings.tracker not in found:
        raise GemmateError(
            f"The tracker {settings.tracker} is not installed; here are "
            f"{', '.join(found) or 'none'}. Install it with pip, or set tracking.tracker=none."
        )
    asked = {"tags": bool(settings.tags), "upload_model": settings.upload_model}
    for key in (key for key, wanted in asked.items() if wanted):
        if settings.tracker not in UPLOADS:
            raise GemmateError(
                f"The tracker {settings.tracker} takes numbers alone. Leave tracking.{key} out, or "
                f"set tracking.tracker to {' or '.join(UPLOADS)}."
            )


@contextlib.contextmanager
def tracking(experiment: Experiment, *, first: bool = True) -> Iterator[Tracking | None]:
    """What to add to a trainer's callbacks; None where no tracker is asked for.

    first: whether this is the process, of several, that tells.

    Trackers that would go online by default, W&B, stay offline unless WANDB_MODE says otherwise.
    Raises: GemmateError as `check_tracker` does.
    """
    settings = experiment.tracking
    check_tracker(settings)
    if settings.tracker == "none" or not first:
        yield None
        return
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    with _environment(_variables(settings)):
        try:
            callback = INTEGRATION_TO_CALLBACK[settings.tracker]()
        except Exception as error:
            log.warning("The tracker %s could not begin: %s", settings.tracker, error)
            callback = None
        yield Tracking(callback, settings)


def _variables(settings: TrackingConfig) -> dict[str, str]:
    """What transformers' callbacks read from the environment instead of from their arguments."""
    return {
        "WANDB_MODE": os.environ.get("WANDB_MODE", "offline"),
        "WANDB_PROJECT": settings.project,
        "WANDB_TAGS": ",".join(settings.tags),
        "MLFLOW_EXPERIMENT_NAME": settings.project,
        "MLFLOW_TAGS": json.dumps(dict.fromkeys(settings.tags, "true")),
        "COMET_PROJECT_NAME": settings.project,
    }


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
