"""tools/slurm.sbatch without Slurm: its command is a real one, and stand-ins see it stop, requeue or fail."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from sprint.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "slurm.sbatch"
STAND_INS = {
    "srun": 'echo "srun $*" >> calls; trap "exit 1" TERM; while [ ! -e end ]; do sleep 0.05; done; exit $(cat end)',
    "scancel": 'echo "scancel $*" >> calls; touch saved; echo 1 > end',
    "scontrol": 'echo "scontrol $*" >> calls; echo node-a; echo node-b',
}


@pytest.fixture
def job(tmp_path):
    """Starts the script in an empty checkout, its Slurm in the folder bin."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    slurm = {
        "SUBMIT_DIR": tmp_path,
        "JOB_ID": 7,
        "JOB_NUM_NODES": 4,
        "CPUS_PER_TASK": 96,
        "JOB_NODELIST": "n",
    }
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    process = subprocess.Popen(["bash", SCRIPT, "1.6b", "seed=3"], env=environment, cwd=tmp_path)
    yield process, tmp_path
    process.kill()
    process.wait()


def calls(folder: Path, word: str) -> list[str]:
    """The stand-ins' calls so far, once there is one that begins with `word`."""
    file, until = folder / "calls", time.monotonic() + 10
    while time.monotonic() < until:
        lines = file.read_text().splitlines() if file.exists() else []
        if any(line.startswith(word) for line in lines):
            return lines
        time.sleep(0.05)
    raise AssertionError(f"no call of {word}")


def test_bash_reads_it():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_it_starts_the_command_of_the_recipe_under_torchrun(job):
    process, folder = job
    (started,) = (line for line in calls(folder, "srun ") if line.startswith("srun "))
    words = shlex.split(started)
    arguments = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])  # exits at an unknown flag
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.max_restarts) == ("4", "8", 3)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_id) == (
        "c10d",
        "node-a:29500",
        "7",
    )
    assert arguments.module and arguments.training_script == "sprint"
    assert arguments.training_script_args == ["distill", "1.6b", "seed=3"]
    limit = next(
        line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH --signal=B:TERM@")
    )
    assert arguments.shutdown_timeout < int(limit.partition("@")[2].split()[0])
    (folder / "end").write_text("0")
    assert process.wait(timeout=10) == 0


def test_near_the_limit_it_stops_the_step_and_goes_back_into_the_queue(job):
    process, folder = job
    calls(folder, "srun ")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0
    assert calls(folder, "scontrol requeue")[-2:] == ["scancel --signal=TERM 7.0", "scontrol requeue 7"]
    assert (folder / "saved").exists()


def test_a_run_that_fails_does_not_go_back(job):
    process, folder = job
    calls(folder, "srun ")
    (folder / "end").write_text("2")
    assert process.wait(timeout=10) == 2
    assert not any("requeue" in line for line in calls(folder, "srun "))


def test_its_examples_are_recipes_with_their_keys():
    lines = [line.split() for line in SCRIPT.read_text().splitlines() if line.startswith("#   sbatch ")]
    examples = [words[words.index("tools/slurm.sbatch") + 1 :] for words in lines]
    assert len(examples) == 2
    for name, *overrides in examples:
        keys = [word for word in overrides if "=" in word]
        assert keys and load_recipe(ROOT / "recipes" / f"{name}.yaml", keys)
