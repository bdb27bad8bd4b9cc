"""Progress bars."""

import sys

from tqdm import tqdm

QUIET_INTERVAL = 30.0  # seconds between progress lines where standard error is not a terminal
BAR = "{desc} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]{postfix}"


def progress(what: str, total: int, done: int = 0, show: bool = True) -> tqdm:
    """A bar on standard error that is gone when it is full; sparse lines where that is no terminal."""
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit=" pictures",
        bar_format=BAR + ", {rate_fmt}",
        file=sys.stderr,
        leave=False,
        disable=not show,
        mininterval=0.2 if sys.stderr.isatty() else QUIET_INTERVAL,
    )
