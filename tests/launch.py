"""Starts several processes for a test: by torchrun, or as forks of one process that has imported everything.

As a program it is that process. A line on its standard input is JSON: {"module", "argv", "output", "ranks"}, of
which "ranks" has the environment of each. It forks a rank each, which runs the module as a program; once all have
ended it answers with a line, the JSON list of their exit codes.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 600  # for all ranks together


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def torchrun(module: str, processes: int, *arguments: str) -> None:
    """Run a module in so many gloo processes; its own asserts and output are the result."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", module, *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode == 0, result.stderr[-3000:]


def forked(module: str, processes: int, *arguments: str) -> None:
    """As `torchrun`, without the seconds that every process needs to import torch, diffusers and DeepSpeed."""
    from torch.distributed import TCPStore  # the program below must not start a thread before it forks

    # torchrun's agent holds this store too, so that no process has to find a free port
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **{"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_WORLD_SIZE": 1, "GROUP_RANK": 0},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port},
        **{"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0},
    }
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    with tempfile.NamedTemporaryFile() as output:
        order = {"module": module, "argv": arguments, "output": output.name, "ranks": ranks}
        server = _server()
        print(json.dumps(order), file=server.stdin, flush=True)
        codes = json.loads(server.stdout.readline())
        assert not any(codes), f"exit codes {codes}: {Path(output.name).read_text(errors='replace')[-3000:]}"


@cache
def _server() -> subprocess.Popen:
    """Of this process; it ends when its standard input does."""
    command = [sys.executable, "-m", "tests.launch"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes)


# ---- the program ------------------------------------------------------------------------------------


def serve(answers: int) -> tuple[dict, int]:
    """Forks until there is nothing more to do. Returns in each of the new processes, with its order and rank."""
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for rank in range(len(order["ranks"])):
            child = os.fork()
            if child == 0:
                return order, rank
            children.append(child)
        codes = _ends_of(children)
        os.write(answers, f"{json.dumps(codes)}\n".encode())
    os._exit(0)  # at once: there is nothing of its own to end


def _ends_of(children: list[int]) -> list[int]:
    """Exit codes. One that fails takes the others with it, as under torchrun; so does the end of their time."""
    codes: dict[int, int] = {}

    def end_all(*_) -> None:
        for child in set(children) - codes.keys():
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end_all)
    signal.alarm(SECONDS)
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:
            end_all()
    signal.alarm(0)
    return [codes[child] for child in children]


def become(order: dict, rank: int) -> None:
    """The process that torchrun would have started."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.environ.update({key: str(value) for key, value in order["ranks"][rank].items()})
    output = os.open(order["output"], os.O_WRONLY | os.O_APPEND)
    for stream, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(descriptor, stream)
    sys.argv[1:] = order["argv"]


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # DeepSpeed prints as it is imported
    import sprint.train.distill  # noqa: F401 (imported for the processes to be forked)
    import tests.tiny  # noqa: F401

    with suppress(ImportError):
        import deepspeed  # noqa: F401
    order, rank = serve(answers)
    become(order, rank)
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
