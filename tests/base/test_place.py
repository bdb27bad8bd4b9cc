"""What launchers say of the processes that they started."""

import pytest

from sprint.base.errors import SprintError
from sprint.base.place import check_launcher

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"WORLD_SIZE": "1"},
        TORCHRUN,
        TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"},  # torchrun in srun
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script itself
        {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_processes_that_know_each_other(told):
    check_launcher(told)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, without RANK, LOCAL_RANK, MASTER_ADDR"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is no number"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2 in the environment of 2 processes"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes .* start torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
    ],
)
def test_processes_that_do_not(told, words):
    with pytest.raises(SprintError, match=words):
        check_launcher(told)
