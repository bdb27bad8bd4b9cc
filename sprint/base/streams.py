"""Standard output and standard error that outlive whoever reads them.

A terminal that is gone, `| head` that has seen enough, a launcher that died: what was to be said goes nowhere from
then on, and the run goes on.
"""

import errno
import io
import os
import sys

GONE = (errno.EPIPE, errno.EIO, errno.ESTALE)  # of a write: nobody will ever read there again


class _Lasting(io.FileIO):
    """The bytes of a standard stream; from the first that cannot be written on, they go to the null device.

    what is not said is an error only on standard output, and only where somebody waits for it: a full disk
    """

    def write(self, data) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for what libraries write there, too
            os.close(nowhere)
            if self.fileno() == 1 and error.errno not in GONE:
                raise OSError(error.errno, error.strerror, "standard output") from error
            return len(data)
        return (
            len(data) if written is None and self.fileno() == 2 else written
        )  # None: a full pipe, not waited for


def outlive_readers() -> None:
    """Make this process's standard streams such ones, once, at its start. Closed ones become the null device."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:  # closed, as with >&-
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
        setattr(sys, name, _stream(descriptor, getattr(sys, name)))


def _stream(descriptor: int, old: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """As Python opens it, but that no character is an error."""
    if old is not None:
        old.flush()
    raw = _Lasting(descriptor, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(old, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=descriptor == 2 or raw.isatty(),
        write_through=bool(getattr(old, "write_through", False)),
    )
