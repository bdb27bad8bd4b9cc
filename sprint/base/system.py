"""Which systems sprint runs on."""

import sys

from sprint.base.errors import SprintError


def check_system() -> None:
    """Raises SprintError where Python has none of POSIX's locks and limits on resources, which runs rely on."""
    try:
        import fcntl  # noqa: F401
        import resource  # noqa: F401
    except ImportError as error:
        raise SprintError(
            f"sprint runs on Linux and macOS, and this is {sys.platform}; on Windows start it in WSL"
        ) from error
