"""What the tests of the command line share, besides the fixtures of `tests.cli.fixtures`."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
STUDENT_WEIGHTS = "student/transformer/diffusion_pytorch_model.safetensors"
RECIPE = """\
name: mini
teacher: {teacher}
data: {{size: 64}}
text: {{max_length: 80, instruction: false}}
adapt: {{steps: 2, batch_size: 4, start: ones, optimizer: {{kind: adamw, lr: 1e-3, betas: [0.9, 0.99]}}}}
distill:
  steps: 3
  batch_size: 4
  ema_decay: 0.5
  optimizer: {{kind: adamw, lr: 1e-3, betas: [0.9, 0.99]}}
  adversarial: {{taps: [1], optimizer: {{kind: adamw, lr: 1e-3, betas: [0.9, 0.99]}}}}
evaluate: {{prompts: 0}}
save_every: 2
"""


class Result(NamedTuple):
    """What a command leaves: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """Of standard error, below the progress bars; what a bar draws over in its line counts as lines."""
        return self.err.replace("\r", "\n").rstrip().split("\n")[-1]


def tree() -> dict[str, int]:
    """Every file and folder here, with the time it was last written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(Path().rglob("*"))}


def spawn(*argv, **options) -> subprocess.Popen:
    """The command as a process of its own, in the current folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = "from sprint.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, argv)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@contextmanager
def files_of_at_most(size: int):
    """Longer files cannot be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
