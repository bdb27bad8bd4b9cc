"""PyTorch's files read as data: what is in them comes out, nothing in them is called, and nothing large is made."""

import argparse
import collections
import io
import os
import pathlib
import pickle
import random
import shlex
import struct
import subprocess
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from sprint.base.errors import SprintError
from sprint.weights.kinds import kind_of
from sprint.weights.pickles import open_pickle, read_spot, spot_of
from sprint.weights.sources import open_source
from sprint.weights.unpickle import Broken, Described, Opaque, unpickle


def opened(content, file, **how):
    torch.save(content, file, **how)
    return open_pickle(file, kind_of(file))


def value(pickled, name: str) -> torch.Tensor:
    size = pickled.file.stat().st_size
    mapped = torch.from_file(str(pickled.file), shared=False, size=size, dtype=torch.uint8)
    return read_spot(mapped, spot_of(pickled, name, pickled.content[name]))


# ---- what comes out -----------------------------------------------------------------------------------

HOW = [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}]


@pytest.mark.parametrize("how", HOW)
def test_tensors_of_every_dtype_layout_and_class(tmp_path, how):
    whole = torch.arange(24.0).reshape(4, 6)
    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    )
    tensors = {
        "whole": whole,
        "transposed": whole.T,
        "part": whole[1:3, ::2],
        "scalar": torch.tensor(7.0),
        "parameter": nn.Parameter(whole * 2),
        "buffer": nn.Buffer(whole * 3),
        "byte": torch.tensor([1], dtype=torch.uint8),  # in old files, all after it lie at odd bytes
        **{str(dtype): (whole + 0.5).to(dtype) for dtype in kinds},
    }
    if "_use_new_zipfile_serialization" not in how:
        tensors["float8"] = whole.to(torch.float8_e4m3fn)
    pickled = opened(tensors, tmp_path / "a.pth", **how)
    assert list(pickled.content) == list(tensors) and pickled.foreign == ()
    for name, tensor in tensors.items():
        found = value(pickled, name)
        assert found.dtype == tensor.dtype
        assert torch.equal(
            found.float() if name == "float8" else found, tensor.float() if name == "float8" else tensor
        )


def test_shared_storages_stay_shared(tmp_path):
    whole = torch.arange(6.0)
    pickled = opened({"a": whole, "b": whole[2:4]}, tmp_path / "a.pth")
    assert pickled.content["a"].storage == pickled.content["b"].storage
    assert value(pickled, "b").tolist() == [2, 3]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_as_pickle_gives_them(protocol):
    plain = {
        "a": [1, -2, 2.5, "ü", None, True, False, 10**30],
        "t": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        3: {},
    }
    plain["again"] = plain["a"]
    content, foreign, _ = unpickle(io.BytesIO(pickle.dumps(plain, protocol)))
    assert content == plain and content["again"] is content["a"] and not foreign


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_trainers_keep_beside_weights_is_harmless(protocol):
    beside = {
        "numpy": np.random.get_state(),
        "generator": np.random.default_rng(1),
        "legacy": np.random.RandomState(1),
        "python": random.getstate(),
        "scalar": np.float64(1.0),
        "array": np.ones((2, 3), np.float32),
        "args": argparse.Namespace(lr=1),
        "path": pathlib.PurePosixPath("a"),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "ordered": collections.OrderedDict(b=1),
        "bytes": [b"x", bytearray(b"x"), {1}, frozenset({1}), 1j],
        "torch": [torch.float32, torch.Size([1, 2]), torch.device("cpu"), torch.strided],
    }
    content, foreign, _ = unpickle(io.BytesIO(pickle.dumps(beside, protocol)))
    assert foreign == () and set(content) == set(beside)
    assert content["ordered"] == {"b": 1} and content["default"] == {"a": [1]}
    assert isinstance(content["args"], Opaque)  # not built


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pytorch_lightning.utilities.parsing", "AttributeDict"),
        ("lightning.pytorch.utilities.parsing", "AttributeDict"),
        ("lightning_fabric.utilities.data", "AttributeDict"),
        ("lightning.fabric.utilities.data", "AttributeDict"),
        ("easydict", "EasyDict"),
        ("addict.addict", "Dict"),
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
        ("torch.torch_version", "TorchVersion"),
    ],
)
def test_what_frameworks_keep_settings_in_is_harmless(module, name):
    """As that class would be pickled, whether or not its package is here."""
    made = b"\x80\x02}(X\x01\x00\x00\x00hc" + f"{module}\n{name}\n".encode() + b")\x81u."
    content, foreign, _ = unpickle(io.BytesIO(made))
    assert foreign == () and content == {"h": Opaque(f"{module}.{name}")}


def test_omegaconf_beside_weights(tmp_path):
    config = pytest.importorskip("omegaconf").OmegaConf.create({"a": {"b": [1, "x", None]}})
    assert opened({"config": config}, tmp_path / "a.pth").foreign == ()


# ---- what is refused ----------------------------------------------------------------------------------


class Calls:
    """Unpickled with code execution, it makes a folder."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    "function", [os.mkdir, os.system, eval, getattr, subprocess.call, np.load, torch.load]
)
def test_functions_are_named_and_never_called(tmp_path, monkeypatch, protocol, function):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.pth"
    torch.save({"w": torch.ones(2), "x": Calls(function, "boom")}, file, pickle_protocol=protocol)
    before = set(tmp_path.iterdir())
    with pytest.raises(SprintError, match=f"would run code .*{function.__name__}") as error:
        open_source(file)
    assert "\n" not in str(error.value) and set(tmp_path.iterdir()) == before


class Net(nn.Module):
    """A class of a trainer's own."""

    def __init__(self):
        super().__init__()
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Linear(2, 2)


class Settings:
    """A trainer's own settings."""


@pytest.mark.parametrize(
    "content",
    [
        Net(),
        {"model": Net(), "step": 3},
        {"model": Net().state_dict(), "settings": Settings()},
        Net().state_dict() | {"settings": Settings()},
        {"a": {"b": Net().state_dict()}, "ema": Net().state_dict(), "settings": Settings()},
    ],
)
def test_the_line_that_makes_a_safe_file_does(tmp_path, content):
    file = tmp_path / "it's mine.pth"
    torch.save(content, file)
    with pytest.raises(
        SprintError, match=r"would run code \(tests\.weights\.test_pickles\.(Net|Settings)"
    ) as error:
        open_source(file)
    python, option, code = shlex.split(str(error.value).partition("may run: ")[2])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    safe = tmp_path / "it's mine-safe.pth"
    pickled = open_pickle(safe, kind_of(safe))
    assert pickled.foreign == ()
    holders = [pickled.content] if "x_embedder.proj.bias" in pickled.content else pickled.content.values()
    assert all(isinstance(holder["x_embedder.proj.bias"], Described) for holder in holders)


# ---- hostile ------------------------------------------------------------------------------------------


def odd_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is in prototype stage, or going
        return _odd_tensors()


def _odd_tensors() -> dict[str, torch.Tensor]:
    return {
        "a meta tensor": torch.ones(2, device="meta"),
        "a sparse tensor": torch.eye(3).to_sparse(),
        "a nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "a quantised tensor": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "an expanded tensor, 1,000,000,000 elements made of 1": torch.ones(1).expand(10**9),
        r"has no values: its shape is \[0, 4\]": torch.ones(0, 4),
    }


@pytest.mark.parametrize("words", odd_tensors())
def test_tensors_that_are_no_plain_ones_are_named(tmp_path, words):
    pickled = opened({"w": odd_tensors()[words]}, tmp_path / "a.pth")
    with pytest.raises(SprintError, match=rf"a.pth: w (is )?{words}"):
        spot_of(pickled, "w", pickled.content["w"])


def test_elements_that_are_not_in_the_file(tmp_path):
    pickled = opened({"w": torch.ones(4)}, tmp_path / "a.pth")
    tensor = pickled.content["w"]
    outside = tensor._replace(offset=1), tensor._replace(shape=(5,)), tensor._replace(stride=(2,))
    for bad in (*outside, tensor._replace(storage=tensor.storage._replace(key="9"))):
        with pytest.raises(SprintError, match="w is truncated: its elements are not all in the file"):
            spot_of(pickled, "w", bad)
    for shape in ((-4,), (2**61,), ("4",), (2.0,), (4, 4), (1,) * 40):
        with pytest.raises(SprintError, match="w has a shape that no tensor has"):
            spot_of(pickled, "w", tensor._replace(shape=shape))


def grown(pickle_bytes: bytes) -> int:
    """Bytes at most that reading this, or refusing it, took."""
    tracemalloc.start()
    try:
        unpickle(io.BytesIO(pickle_bytes))
    except Broken:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_small_pickles_that_would_take_gigabytes_take_nothing():
    nested = b"\x80\x02K\x01" + b"\x86".join([b"2"] * 40) + b"\x86."  # a pair of pairs of pairs …, as a key
    small = {
        "bytearray(2**31 - 1)": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "an array": pickle.dumps(Calls(np.ndarray, (2**31,))),
        "a memo far away": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "more bytes than there are": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
        "a frame larger than the file": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
        "a dict whose key takes for ever to hash": b"\x80\x02}" + nested[2:-1] + b"Ns.",
    }
    assert {name: grown(content) < 100_000 for name, content in small.items()} == dict.fromkeys(small, True)


def test_a_pickle_without_end_is_cut(monkeypatch):
    monkeypatch.setattr("sprint.weights.unpickle.MOST_INSTRUCTIONS", 1000)
    with pytest.raises(Broken, match="more than 1,000 instructions"):
        unpickle(io.BytesIO(b"\x80\x02" + b"N0" * 1000 + b"."))


def test_a_compressed_zip_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**7))
    with pytest.raises(SprintError, match=r"bomb.pth is .*bomb/data.pkl in it is compressed"):
        open_source(tmp_path / "bomb.pth")


@pytest.mark.parametrize("how", HOW)
def test_damage_anywhere_is_one_line(tmp_path, how):
    """Bytes changed, and files cut: opened, or refused in one line."""
    file, random_ = tmp_path / "a.pth", random.Random(0)
    torch.save(
        {"state_dict": {"x_embedder.proj.weight": torch.ones(3, 4)}, "step": [1, {"a": 2}]}, file, **how
    )
    whole = file.read_bytes()
    for trial in range(400):
        damaged = bytearray(whole[: random_.randrange(len(whole))] if trial % 4 == 0 else whole)
        for _ in range(random_.randint(1, 4)):
            if damaged:
                damaged[random_.randrange(len(damaged))] = random_.randrange(256)
        file.write_bytes(damaged)
        try:
            open_source(file)
        except SprintError as error:
            assert "\n" not in str(error)
