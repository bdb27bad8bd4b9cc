import errno
import json
import os
import signal
import subprocess
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from sprint import checkpoint
from sprint.checkpoint import claim, latest, load, save
from sprint.errors import SprintError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def damage(path: Path) -> None:
    """Flip one bit in the middle of the state."""
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def test_state_goes_round(tmp_path):
    model = torch.nn.Linear(2, 3)
    state = {
        "model": model.state_dict(),
        "step": 7,
        "lr": 1e-3,
        "phase": "generator",
        "seen": [1, (2.5, None), True],
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
    }
    path = save(tmp_path / "run" / "checkpoints", "distill-000007", state)
    assert path.name == "000001-distill-000007"
    loaded = load(path)
    assert torch.equal(loaded["model"]["weight"], model.weight)
    assert loaded["half"].dtype == torch.bfloat16
    assert {key: loaded[key] for key in ("step", "lr", "phase", "seen")} == {
        "step": 7,
        "lr": 1e-3,
        "phase": "generator",
        "seen": [1, (2.5, None), True],
    }


class Phase(str, Enum):
    generator = "generator"


@pytest.mark.parametrize(
    ("value", "kind"), [(np.float64(1.0), "float64"), (Phase.generator, "Phase"), ({1, 2}, "set")]
)
def test_what_could_not_be_read_back_is_refused_by_name(tmp_path, value, kind):
    with pytest.raises(TypeError, match=rf"state\['a'\]\[1\] is a {kind}"):
        save(tmp_path, "step", {"a": [0, value]})
    assert names(tmp_path) == []


def test_newest_are_kept_in_order_of_saving(tmp_path):
    for name in ("adapt-9", "distill-1", "adapt-10"):
        save(tmp_path, name, {"name": name})
    assert names(tmp_path) == ["000002-distill-1", "000003-adapt-10"]
    assert load(latest(tmp_path)) == {"name": "adapt-10"}
    save(tmp_path, "adapt-10", {"name": "again"}, keep=1)
    assert names(tmp_path) == ["000004-adapt-10"]


def test_latest_of_an_empty_or_missing_folder_is_none(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None


def test_damaged_checkpoint_is_skipped_with_one_line(tmp_path, capsys):
    good = save(tmp_path, "a", {"x": torch.arange(1000)})
    bad = save(tmp_path, "b", {"x": torch.arange(1000)})
    damage(bad)
    assert latest(tmp_path) == good
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "000002-b is damaged" in warning
    (good / "state.pt").write_bytes(b"")
    assert latest(tmp_path) is None
    assert save(tmp_path, "c", {"x": 1}) == latest(tmp_path)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"sha256": "0", "bytes": null}'])
def test_unreadable_manifest_counts_as_damage(tmp_path, manifest):
    path = save(tmp_path, "a", {"x": 1})
    (path / "manifest.json").write_text(manifest)
    assert latest(tmp_path) is None


def test_manifest_is_the_hash_of_the_file(tmp_path):
    path = save(tmp_path, "a", {"x": torch.zeros(10)})
    manifest = json.loads((path / "manifest.json").read_text())
    digest = subprocess.run(["sha256sum", path / "state.pt"], capture_output=True, text=True, check=True)
    assert manifest == {"sha256": digest.stdout.split()[0], "bytes": (path / "state.pt").stat().st_size}


def test_load_runs_no_code_and_names_what_it_cannot_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "000001-trap"
    path.mkdir()
    torch.save({"trap": Trap()}, path / "state.pt")
    with pytest.raises(SprintError, match=r"cannot read checkpoint .*000001-trap"):
        load(path)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(SprintError, match="missing"):
        load(tmp_path / "missing")


def test_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    save(tmp_path, "a", {"x": 1})
    save(tmp_path, "b", {"x": 2})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SprintError, match="No space left on device") as caught:
        save(tmp_path, "c", {"x": 3})
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["000001-a", "000002-b"]
    assert load(latest(tmp_path)) == {"x": 2}


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from sprint.checkpoint import save
from sprint.errors import SprintError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(Path(sys.argv[1]), "big", {"x": torch.zeros(100_000)})
except SprintError as error:
    print(error)
"""


def test_write_that_fails_half_way_through_the_tensors_is_one_line(tmp_path):
    save(tmp_path, "small", {"x": 1})
    run = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True)
    assert run.stdout.startswith("cannot write checkpoint big") and run.stdout.count("\n") == 1
    assert "File too large" in run.stdout
    assert names(tmp_path) == ["000001-small"]


KILLED = """
import os, signal, sys
from pathlib import Path
from sprint import checkpoint
checkpoint.sha256 = lambda path: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(Path(sys.argv[1]), "b", {"x": 2})
"""


def test_kill_in_the_middle_leaves_the_older_one_latest_and_is_swept(tmp_path):
    save(tmp_path, "a", {"x": 1})
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path])
    assert run.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".writing-000002-b", "000001-a"]
    assert load(latest(tmp_path)) == {"x": 1}
    save(tmp_path, "c", {"x": 3})
    assert names(tmp_path) == ["000001-a", "000002-c"]


def test_interrupt_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path, "a", {"x": 1})

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "b", {"x": 2})
    assert names(tmp_path) == ["000001-a"]


def test_claim_refuses_another_recipe_and_allows_the_same_again(tmp_path):
    run = tmp_path / "runs" / "tiny"
    claim(run, "a" * 12)
    claim(run, "a" * 12)
    with pytest.raises(SprintError, match=r"another recipe \(aaaaaaaaaaaa, this one is bbbbbbbbbbbb\)"):
        claim(run, "b" * 12)
    assert (run / "recipe.hash").read_text() == "a" * 12 + "\n"


def test_claim_on_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SprintError, match=r"cannot use .*file for a run: File exists"):
        claim(tmp_path / "file", "a")


CLAIM = """
import sys
from pathlib import Path
from sprint.checkpoint import claim
from sprint.errors import SprintError
try:
    claim(Path(sys.argv[1]), "hash")
    print("claimed")
    sys.stdin.read()
except SprintError as error:
    print(error)
"""


def test_second_process_is_refused_until_the_first_ends(tmp_path):
    def start():
        return subprocess.Popen(
            [sys.executable, "-uc", CLAIM, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    with start() as first:
        assert first.stdout.readline() == "claimed\n"
        with start() as second:
            refused = second.communicate()[0]
        assert refused.startswith(f"{tmp_path} is in use by process {first.pid}")
        first.kill()
    with start() as third:
        assert third.communicate()[0] == "claimed\n"
