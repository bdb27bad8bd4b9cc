"""Locks of code that torch and DeepSpeed compile on first use.

A process that is killed meanwhile leaves its lock behind, and every later one waits for it for ever, without a word.
"""

import logging
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)
LONGEST = 600.0  # seconds: an operation of DeepSpeed compiles in one or two minutes


def remove_stale_locks() -> list[Path]:
    """Remove locks that are older than any compilation takes, each with a warning.  -> those"""
    root, removed = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()), []
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        try:
            old = time.time() - lock.stat().st_mtime
            if old > LONGEST:
                lock.unlink()
                removed.append(lock)
                log.warning("%s: removed; what compiled there was stopped %d minutes ago", lock, old / 60)
        except OSError:  # another process was faster, or it is not ours
            continue
    return removed
