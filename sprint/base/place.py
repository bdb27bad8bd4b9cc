"""Where this process works: its device, and which of how many processes it is, without an engine."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sprint.base.door import shown
from sprint.base.errors import SprintError

# how many processes other launchers started, which tell nobody how to meet
STARTED = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
TOLD = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE


def check_launcher(told: Mapping[str, str] = os.environ) -> None:
    """Raises SprintError for variables of the environment that torchrun would not have set so."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if name in told and not (told[name].isdecimal() and len(told[name]) < 10):
            raise SprintError(f"{name}={shown(told[name])} in the environment is no number; unset it")
    processes = int(told.get("WORLD_SIZE", 1))
    if processes > 1 and (missing := [name for name in TOLD if name not in told]):
        raise SprintError(
            f"WORLD_SIZE={processes} in the environment, without {', '.join(missing)}: start with "
            "torchrun … -m sprint, or unset WORLD_SIZE for one process"
        )
    if int(told.get("RANK", 0)) >= max(processes, 1):
        raise SprintError(
            f"RANK={told['RANK']} in the environment of {processes} processes; unset both, or use torchrun"
        )
    for name, launcher in STARTED.items() if "WORLD_SIZE" not in told else ():
        if told.get(name, "1").isdecimal() and int(told.get(name, "1")) > 1:
            raise SprintError(
                f"{launcher} started {told[name]} processes ({name}) that do not know of each other: start torchrun "
                "with it, once a machine, and that starts sprint"
            )


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, as torchrun says."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_this_process(cls) -> "Place":
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def usable_device(name: str | None) -> str:
    """The name, if a tensor can live and be read there; without one, CUDA where there is one. Raises SprintError."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: built without CUDA
        reason = str(error).split("\n")[0]
        raise SprintError(f"device {name} cannot be used here: {reason}") from error
    return name
