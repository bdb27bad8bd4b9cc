"""A compiler's lock outlives the process that was killed; a run must not wait for it."""

import os
import time

from sprint.engine.extensions import LONGEST, remove_stale_locks


def test_only_locks_older_than_any_compilation_go(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, fresh = tmp_path / "py_cpu" / "a" / "lock", tmp_path / "b" / "lock"
    for lock in (stale, fresh):
        lock.parent.mkdir(parents=True)
        lock.touch()
    then = time.time() - LONGEST - 60
    os.utime(stale, (then, then))
    assert remove_stale_locks() == [stale]
    assert not stale.exists() and fresh.exists()
    assert f"{stale}: removed; what compiled there was stopped 11 minutes ago" in caplog.text
    assert remove_stale_locks() == []
