import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from sprint.base.errors import SprintError
from sprint.engine import dcp
from sprint.engine.checkpoint import Saver, latest, read_facts, read_tensors
from tests.engine.checkpoint_processes import full_disk, whole_state
from tests.launch import forked


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((7, 3), value), "half": torch.tensor([value, 0.5]).bfloat16()}


def save(folder: Path, name: str, value: float = 1.0, keep: int = 2) -> Path:
    saver = Saver(folder, keep)
    saver.save(name, tensors(value), {"name": name})
    saver.wait()
    return max(folder.glob(f"0*-{name}"))


def holds(path: Path, value: float) -> bool:
    found = tensors(0.0)
    read_tensors(path, found)
    return all(torch.equal(found[key], tensor) for key, tensor in tensors(value).items())


@pytest.fixture
def held(monkeypatch):
    """Background writes wait for this event, once their tensors are copied."""
    event = threading.Event()
    write = dcp.Writer.write_data

    def write_later(self, plan, planner):
        assert event.wait(60)
        return write(self, plan, planner)

    monkeypatch.setattr(dcp.Writer, "write_data", write_later)
    yield event
    event.set()


# ---- what goes in comes out -------------------------------------------------------------------------


def test_state_is_as_it_was_when_save_returned(tmp_path, held):
    state = {
        "weight": torch.nn.Linear(2, 3).weight,
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "none": torch.empty(0, 4),
        "random": torch.get_rng_state(),
        "a.b/c d": torch.tensor([True, False]),
    }
    before = {key: tensor.detach().clone() for key, tensor in state.items()}
    facts = {"lr": [1e-3]}
    saver = Saver(tmp_path / "run" / "checkpoints")
    saver.save("distill-7", state, facts)
    facts["lr"].append(2.0)
    for tensor in state.values():
        tensor.data.zero_()
    assert not saver.troubled and names(saver.folder) == [".writing-000001-distill-7"]
    held.set()
    saver.wait()
    path = latest(saver.folder)
    assert path.name == "000001-distill-7"
    read_tensors(path, state)
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
    assert read_facts(path) == {"lr": [1e-3]}


def test_copies_are_filled_again_and_hold_no_more_than_is_written(tmp_path):
    saver = Saver(tmp_path)
    saver.save("a", tensors(1.0), {})
    saver.wait()
    places = {index.fqn: copy.data_ptr() for index, copy in saver._copies.items()}
    saver.save("b", tensors(2.0), {})
    saver.wait()
    assert {index.fqn: copy.data_ptr() for index, copy in saver._copies.items()} == places
    assert holds(tmp_path / "000001-a", 1.0) and holds(tmp_path / "000002-b", 2.0)
    saver.save("c", {"weight": torch.ones(2, 2)}, {})
    saver.wait()
    assert [(index.fqn, copy.shape) for index, copy in saver._copies.items()] == [("weight", (2, 2))]


def test_a_save_that_is_waited_for_is_on_disk_and_copies_nothing(tmp_path, monkeypatch):
    saver = Saver(tmp_path)
    saver.save("a", tensors(1.0), {})
    state = tensors(2.0) | {"transposed": torch.arange(6.0).reshape(2, 3).T}
    written = []
    resolve = dcp.CopyingPlanner.resolve_data
    monkeypatch.setattr(
        dcp.CopyingPlanner,
        "resolve_data",
        lambda self, item: written.append(resolve(self, item)) or written[-1],
    )
    saver.save("b", state, {"name": "b"}, wait=True)
    assert {tensor.data_ptr() for tensor in written} == {tensor.data_ptr() for tensor in state.values()}
    assert not saver._copies and read_facts(tmp_path / "000002-b") == {"name": "b"}
    found = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    read_tensors(tmp_path / "000002-b", found)
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_facts_come_back_bit_for_bit(tmp_path):
    floats = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, float("inf"), float("nan")]
    facts = {
        "floats": floats,
        "big": 2**70,
        "none": None,
        "yes": True,
        "text": "é\ud800\n",
        "deep": [{"a": []}],
    }
    saver = Saver(tmp_path)
    saver.save("a", {}, facts)
    saver.wait()
    found = read_facts(latest(tmp_path))
    assert [struct.pack("d", value) for value in found.pop("floats")] == [struct.pack("d", f) for f in floats]
    assert found == {key: value for key, value in facts.items() if key != "floats"}
    assert found["yes"] is True


class Phase(str, Enum):
    generator = "generator"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(1.0), "is a float64"),
        (Phase.generator, "is a Phase"),
        ({1, 2}, "is a set"),
        ((1, 2), "is a tuple"),
        (torch.ones(1), "is a Tensor"),
        ({3: 4}, "has the key 3"),
    ],
)
def test_facts_that_would_come_back_different_are_refused_by_name(tmp_path, value, kind):
    with pytest.raises(TypeError, match=rf"facts\['a'\]\[1\] {kind}"):
        Saver(tmp_path).save("step", {}, {"a": [0, value]})
    with pytest.raises(TypeError, match=r"tensors\['x'\] is a int"):
        Saver(tmp_path).save("step", {"x": 3}, {})
    assert names(tmp_path) == []


def test_any_subset_is_read_in_place(tmp_path):
    path = save(tmp_path, "a", 2.0)
    weight = torch.nn.Parameter(torch.zeros(7, 3))
    place = weight.data_ptr()
    read_tensors(path, {"weight": weight})
    assert weight.data_ptr() == place and bool((weight == 2.0).all()) and weight.requires_grad


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"head": torch.ones(2)}, "nothing under 'head' where torch.float32 (2,)"),
        ({"weight": torch.ones(3, 7)}, "torch.float32 (7, 3) under 'weight' where torch.float32 (3, 7)"),
        ({"half": torch.ones(2)}, "torch.bfloat16 (2,) under 'half' where torch.float32 (2,)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_read(tmp_path, wanted, found):
    fits = torch.zeros(7, 3)
    with pytest.raises(SprintError) as caught:
        read_tensors(save(tmp_path, "a"), {"weight": fits} | wanted)
    assert f"000001-a has {found} is wanted" in str(caught.value)
    assert not fits.any()


# ---- which one --------------------------------------------------------------------------------------


def test_newest_are_kept_in_order_of_saving(tmp_path):
    saver = Saver(tmp_path)
    saver.save("adapt-9", tensors(1.0), {})
    saver.save("distill-1", tensors(2.0), {})
    assert "000001-adapt-9" in names(tmp_path)  # one at a time: safe before the next begins
    saver.save("adapt-10", tensors(3.0), {})
    saver.wait()
    assert names(tmp_path) == ["000002-distill-1", "000003-adapt-10"]
    assert holds(latest(tmp_path), 3.0)
    save(tmp_path, "adapt-10", keep=1)
    assert names(tmp_path) == ["000004-adapt-10"]


def test_latest_of_an_empty_or_missing_folder_is_none(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None


def put_back(path: Path) -> None:
    """Undo that a damaged one was set aside."""
    aside = path.with_name(f".damaged-{path.name}")
    if aside.exists():
        aside.rename(path)


def test_a_damaged_checkpoint_is_set_aside_and_does_not_count_as_kept(tmp_path):
    for name in "abc":
        path = save(tmp_path, name)
    (path / "facts.json").write_text("")
    assert latest(tmp_path).name == "000002-b"
    save(tmp_path, "d")
    assert names(tmp_path) == [".damaged-000003-c", "000002-b", "000003-d"]


def test_one_flipped_bit_or_lost_byte_in_any_file_is_damage(tmp_path, capsys):
    good, bad = save(tmp_path, "a"), save(tmp_path, "b")
    files = [".metadata", "__0_0.distcp", "facts.json", "manifest.json"]
    assert names(bad) == files
    for file in files:
        content = (bad / file).read_bytes()
        for place in range(0, len(content), 1 + len(content) // 60):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            (bad / file).write_bytes(flipped)
            assert latest(tmp_path) == good, (file, place)
            put_back(bad)
        (bad / file).write_bytes(content[:-1])
        assert latest(tmp_path) == good
        put_back(bad)
        (bad / file).unlink()
        capsys.readouterr()
        assert latest(tmp_path) == good
        put_back(bad)
        warning = capsys.readouterr().err
        assert warning.count("\n") == (file != "manifest.json")  # without it, it never was one
        assert file == "manifest.json" or "000002-b is damaged" in warning
        (bad / file).write_bytes(content)
        assert latest(tmp_path) == bad
    (good / "facts.json").write_text("")
    (bad / "facts.json").write_text("")
    assert latest(tmp_path) is None
    assert save(tmp_path, "c") == latest(tmp_path)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": {}}', '{"files": {"facts.json": null}}'])
def test_unreadable_manifest_counts_as_damage(tmp_path, manifest):
    path = save(tmp_path, "a")
    (path / "manifest.json").write_text(manifest)
    assert latest(tmp_path) is None


def test_manifest_holds_size_and_hash_of_every_other_file(tmp_path):
    path = save(tmp_path, "a")
    files = {name: (path / name).read_bytes() for name in names(path) if name != "manifest.json"}
    assert json.loads((path / "manifest.json").read_text())["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }


# ---- what is read is not run ------------------------------------------------------------------------


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reading_runs_no_code_and_names_what_it_cannot_read(tmp_path):
    path, sprung = save(tmp_path, "a"), tmp_path / "sprung"
    index = pickle.loads((path / ".metadata").read_bytes())  # as the library would
    (path / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(
        SprintError, match=r"cannot read checkpoint .*000001-a: its index asks for posix.mkdir"
    ):
        read_tensors(path, tensors())

    index.state_dict_metadata["weight"].properties.trap = Trap(sprung)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    torch.save(Trap(sprung), path / "__0_0.distcp")
    for info in index.storage_data.values():
        info.offset, info.length = 0, (path / "__0_0.distcp").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(SprintError, match=r"cannot read checkpoint .*000001-a: UnpicklingError") as caught:
        read_tensors(path, tensors())
    assert "\n" not in str(caught.value)
    assert not sprung.exists()


@pytest.mark.parametrize("index", [b"", b"no pickle", pickle.dumps(torch.Size([1]))])
def test_broken_index_or_facts_are_one_line(tmp_path, index):
    path = save(tmp_path, "a")
    (path / ".metadata").write_bytes(index)
    (path / "facts.json").write_bytes(index[:3])
    for read in (lambda: read_tensors(path, tensors()), lambda: read_facts(path)):
        with pytest.raises(SprintError, match=r"cannot read checkpoint .*000001-a: ") as caught:
            read()
        assert "\n" not in str(caught.value)


# ---- what can go wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_older_checkpoints_and_nothing_else(tmp_path, monkeypatch, call):
    """At the first tensor's file, or at the very end."""
    save(tmp_path, "a", 1.0)
    save(tmp_path, "b", 2.0)
    monkeypatch.setattr(os, call, full_disk)
    saver = Saver(tmp_path)
    saver.save("c", tensors(), {})
    for again in (saver.wait, saver.wait, lambda: saver.save("d", tensors(), {})):
        with pytest.raises(
            SprintError, match=r"checkpoint c .*: No space left on device; earlier .* safe"
        ) as caught:
            again()
        assert "\n" not in str(caught.value)
    assert saver.troubled
    assert names(tmp_path) == ["000001-a", "000002-b"]
    assert holds(latest(tmp_path), 2.0)


@pytest.mark.parametrize("limit", [100, 10_000])
def test_write_that_fails_half_way_is_one_line(tmp_path, limit):
    """100 bytes stop the first tensor's header or the facts; 10,000 a tensor in its middle."""
    save(tmp_path, "small")
    saver = Saver(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))  # Python ignores the signal
    try:
        saver.save("big", {"x": torch.zeros(100_000)}, {})
        with pytest.raises(SprintError, match=r"cannot write checkpoint big in .*: File too large") as caught:
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["000001-small"]


def run(code: str, *command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*command[:-1], sys.executable, "-c", code, command[-1]], text=True, **options)


FULL = """
import subprocess, sys, torch
from pathlib import Path
from sprint.engine.checkpoint import Saver, latest
from sprint.base.errors import SprintError
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
saver = Saver(folder)
try:
    for step in range(9):
        saver.save(f"step-{step}", {"x": torch.full((70_000,), step)}, {})
    saver.wait()
except SprintError as error:
    print(error)
print(latest(folder).name, *sorted(entry.name for entry in folder.iterdir()))
"""


def test_disk_that_is_really_full(tmp_path):
    unshare = ["unshare", "-Urm"]
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(unshare + mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    output = run(FULL, *unshare, tmp_path, capture_output=True).stdout.splitlines()
    assert output[0].startswith("cannot write checkpoint step-1") and "No space left on device" in output[0]
    assert output[1:] == ["000001-step-0 000001-step-0"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from sprint.engine import checkpoint
checkpoint.sha256 = lambda path: os.kill(os.getpid(), signal.SIGKILL)
saver = checkpoint.Saver(Path(sys.argv[1]))
saver.save("b", {"x": torch.ones(2)}, {})
saver.wait()
"""


@pytest.mark.slow
def test_kill_in_the_middle_leaves_the_older_one_latest_and_is_swept(tmp_path):
    save(tmp_path, "a", 1.0)
    assert run(KILLED, tmp_path).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".writing-000002-b", "000001-a"]
    assert holds(latest(tmp_path), 1.0)
    save(tmp_path, "c")
    assert names(tmp_path) == ["000001-a", "000002-c"]


LEFT = """
import os, sys, threading, torch
from pathlib import Path
from sprint.engine import checkpoint
checkpoint.PATIENCE = float(sys.argv[2])
os.fsync = lambda descriptor: threading.Event().wait(float(sys.argv[3]))
checkpoint.Saver(Path(sys.argv[1])).save("a", {"x": torch.ones(2)}, {})
raise RuntimeError("the trainer's own")
"""


def test_program_that_ends_finishes_a_slow_write_and_abandons_one_that_hangs(tmp_path):
    command = [sys.executable, "-c", LEFT]
    slow = subprocess.Popen([*command, tmp_path / "slow", "60", "0.1"], stderr=subprocess.PIPE, text=True)
    hung = subprocess.Popen([*command, tmp_path / "hung", "0.5", "600"], stderr=subprocess.PIPE, text=True)
    for process in (slow, hung):
        assert process.communicate(timeout=60)[1].endswith("RuntimeError: the trainer's own\n")
        assert process.returncode == 1
    assert names(tmp_path / "slow") == ["000001-a"]
    assert names(tmp_path / "hung") == [".writing-000001-a"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_tensors_are_copied_in_the_order_of_the_callers_stream(tmp_path):
    saver = Saver(tmp_path)
    with torch.cuda.stream(torch.cuda.Stream()):
        weight = torch.zeros(2**26, device="cuda")
        for _ in range(100):
            weight += 1
        saver.save("a", {"weight": weight}, {})
        weight.zero_()
    saver.wait()
    read_tensors(latest(tmp_path), {"weight": weight})
    assert bool((weight == 100).all())


def test_what_an_exception_left_in_the_making_is_waited_for(tmp_path, held):
    Saver(tmp_path).save("a", tensors(1.0), {})
    threading.Timer(0.3, held.set).start()
    saver = Saver(tmp_path)  # the run goes on in the same process
    assert names(tmp_path) == ["000001-a"]
    saver.save("b", tensors(2.0), {})
    assert latest(tmp_path).name == "000002-b"


def test_two_processes_write_for_one_and_read_what_one_wrote(tmp_path):
    """Uneven shards, a hybrid mesh, plain tensors, one that only one process has; then a disk that is full there."""
    saver = Saver(tmp_path / "one")
    saver.save("whole", whole_state(), {})
    saver.wait()
    forked("tests.engine.checkpoint_processes", 2, str(tmp_path))
    path = latest(tmp_path / "two")
    assert names(path) == [".metadata", "__0_0.distcp", "__1_0.distcp", "facts.json", "manifest.json"]
    found = {key: torch.zeros_like(tensor) for key, tensor in whole_state().items()}
    read_tensors(path, found)
    for key, tensor in whole_state().items():
        assert torch.equal(found[key], tensor), key
    stored = [torch.load(path / f"__{rank}_0.distcp", weights_only=True) for rank in (0, 1)]
    assert all(isinstance(first, torch.Tensor) for first in stored)  # both wrote
    for rank in (0, 1):
        heard = (tmp_path / f"heard-by-{rank}").read_text()
        assert "cannot write checkpoint distill-2" in heard
        assert "No space left on device (process 1); earlier" in heard
        assert "has nothing under 'nowhere'" in (tmp_path / f"missed-by-{rank}").read_text()
    assert names(tmp_path / "two") == ["000001-distill-1"]
