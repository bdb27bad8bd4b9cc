"""Weights & Biases: looked at before anything is built, and never in the way of a run that has begun."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sprint.base.door import shown
from sprint.base.errors import SprintError

log = logging.getLogger(__name__)
MODE, MODES = "WANDB_MODE", ("online", "offline", "disabled", "shared", "dryrun", "run")
SENDING = ("online", "shared", "run")  # of these: they need a key


def check_tracking() -> None:
    """Raises SprintError where the package is missing, its mode is none, or it would ask a person for a key."""
    try:
        import wandb
    except ImportError as error:
        raise SprintError("wandb=true needs a package: pip install sprint-distill[track]") from error
    mode = os.environ.setdefault(MODE, "offline")
    if mode not in MODES:
        raise SprintError(f"{MODE}={shown(mode)}: it is one of {', '.join(MODES[:3])}")
    try:
        key, why = mode not in SENDING or wandb.Api().api_key, "and wandb has no key"
    except Exception as error:  # wandb's own, and those of its settings file and of netrc
        key, why = None, _first_line(error)
    if not key:
        raise SprintError(f"{MODE}={mode}: {why}; run `wandb login` first, or set {MODE}=offline")


class Tracked:
    """One run there, with a step axis for each stage. Raises SprintError where it cannot begin."""

    def __init__(self, folder: Path, stages: Mapping[str, int]):
        check_tracking()
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(project="sprint", name=folder.name, dir=str(folder))
            for stage in stages:
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        except Exception as error:
            raise SprintError(
                f"wandb cannot begin: {_first_line(error)}; look at the network, or set {MODE}=offline"
            ) from error

    def log(self, numbers: Mapping[str, float | None]) -> None:
        self._try(lambda: self._run.log(dict(numbers)))

    def finish(self) -> None:
        self._try(self._run.finish)

    def _try(self, call: Callable[[], None]) -> None:
        """What is lost there stands in metrics.jsonl all the same."""
        try:
            call()
        except Exception as error:
            log.warning("wandb: %s; metrics.jsonl has every line", _first_line(error))


def _first_line(error: Exception) -> str:
    return shown(str(error).strip().partition("\n")[0] or type(error).__name__)
