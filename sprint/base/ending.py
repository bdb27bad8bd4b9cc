"""How a process ends that has shared work with others: before Python takes itself apart."""

import atexit
import os
import sys
import threading
from collections.abc import Callable


def run_to_end(main: Callable[[], object]) -> None:
    """Call `main` and end this process, with the exit code and the last words that Python would give it.

    Where processes have met, the interpreter is not taken apart. A thread of gloo keeps the tensors of a collective
    for a moment after it is over. To let go of one it asks for the interpreter's lock; Python ends a thread that asks
    at that stage, here inside a destructor, and so the process aborts: "terminate called without an active
    exception" (pytorch#190489). Only the last reference to a group ends its threads, and DDP and DeepSpeed keep some.

    Never returns. Raises SystemExit where no processes have met, and what `main` raises that is no Exception.
    """
    code = 0
    try:
        main()
    except SystemExit as asked:
        code = _code_of(asked)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    if _have_met():
        _leave(code)
    sys.exit(code)


def _code_of(asked: SystemExit) -> int:
    """Its number; words are written to standard error, with 1."""
    if isinstance(asked.code, int | None):
        return asked.code or 0
    print(asked.code, file=sys.stderr)
    return 1


def _have_met() -> bool:
    """Whether this process is in a group; most verbs do not even import torch.distributed."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _leave(code: int) -> None:
    """What Python does at its end, in its order, but for the last step."""
    threading._shutdown()  # waits for all threads but daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
