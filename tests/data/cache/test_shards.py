"""One shard: whole or not there, whoever else writes it."""

import hashlib
import os
import socket
import subprocess

import pytest
import torch

from sprint.base.errors import SprintError
from sprint.base.files import sweep
from sprint.data.batch import Encoded
from sprint.data.cache import shards
from sprint.data.cache.shards import Entry, Skipped, read_record, write_shard


def encoded(value: float = 1.0) -> Encoded:
    return Encoded(torch.full((2, 3, 3), value), torch.full((4, 5), value))


def test_a_shard_is_whole_or_not_there(tmp_path):
    def failing():
        yield Entry(0, "a dot", 12, 12, encoded())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 0, 0, failing(), torch.float32)
    assert list(tmp_path.iterdir()) == [] and not shards.is_whole(tmp_path, 0)
    entries = [Skipped(5, "empty caption", "b.txt"), Entry(6, "a dot", 12, 12, encoded())]
    record = write_shard(tmp_path, 0, 5, entries, torch.float32)
    assert record == read_record(tmp_path, 0) and shards.is_whole(tmp_path, 0)
    assert (record.samples, record.first, record.skipped) == (1, 5, [entries[0]])
    (tmp_path / "000000.json").write_text("{}")
    assert not shards.is_whole(tmp_path, 0)


def test_of_two_that_write_a_shard_the_first_stays(tmp_path, monkeypatch):
    """They may have been encoded on other devices: tar and record are of one of them."""

    def meanwhile():
        yield Entry(0, "a dot", 12, 12, encoded(1.0))
        with monkeypatch.context() as other:
            other.setattr(shards.os, "getpid", lambda: 1)
            write_shard(tmp_path, 0, 0, [Entry(0, "a dot", 12, 12, encoded(2.0))], torch.float32)

    record = write_shard(tmp_path, 0, 0, meanwhile(), torch.float32)
    assert {path.name for path in tmp_path.iterdir()} == {"000000.tar", "000000.json", ".lock"}
    content = (tmp_path / "000000.tar").read_bytes()
    assert record == read_record(tmp_path, 0) and record.sha256 == hashlib.sha256(content).hexdigest()
    assert torch.full((2, 3, 3), 2.0).numpy().tobytes() in content


def test_what_a_dead_process_left_is_swept(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    owners = {"dead": (socket.gethostname(), gone.pid), "us": (socket.gethostname(), os.getpid())}
    owners["elsewhere"] = ("another.host", gone.pid)
    files = {owner: tmp_path / f".000001.tar.{host}.{pid}.part" for owner, (host, pid) in owners.items()}
    for file in files.values():
        file.touch()
    sweep(tmp_path)
    assert {owner for owner, file in files.items() if file.exists()} == {"us", "elsewhere"}


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(SprintError, match=r"000000\.tar: cannot be written: No space left on device"):
        write_shard(tmp_path, 0, 0, [Entry(0, "a dot", 12, 12, encoded())], torch.float32)
    assert list(tmp_path.iterdir()) == []
