"""What a file is: told by its bytes, whatever its name; everything else is named for what it is, with what to do."""

import gzip
import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sprint.base.errors import SprintError
from sprint.weights.kinds import Kind, kind_of


def packed(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def arrays(**named) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **named)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.pth"))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 2370000000\n"
OTHERS = {
    "a Git LFS pointer.*git lfs pull": LFS,
    "a web page saved under this name.*hf auth login": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    "a web page": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a GGUF file": b"GGUF\x03\0\0\0" + b"\0" * 64,
    "truncated or not a checkpoint: it is empty": b"",
    "truncated or not a checkpoint: it is text": b"hello",
    "truncated or not a checkpoint: it begins with ff ff": b"\xff\xff\0\0",
    "truncated or not a checkpoint: a pickle that torch.save did not write": b"\x80\x04]\x94.",
    "truncated or not a checkpoint: a damaged zip": b"PK\x03\x04" + b"\0" * 90,
    "a zip archive.*unpack it": packed("model.safetensors", b""),
    "a TorchScript program": packed("net/constants.pkl", b""),
    "NumPy's": arrays(a=np.ones(2)),
    "compressed with gzip": gzip.compress(b"x"),
    "a tar archive": tar(),
    r"not a checkpoint but JSON \(Invalid .* password.\)": b'{"error": "Invalid username or password."}',
}


@pytest.mark.parametrize("suffix", [".safetensors", ".PTH", ""])
@pytest.mark.parametrize("words", OTHERS)
def test_what_holds_no_weights_is_named(tmp_path, words, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(OTHERS[words])
    with pytest.raises(SprintError, match=f"model{suffix} is {words}") as error:
        kind_of(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["MODEL.SafeTensors", "model.pth", "blob"])
def test_weights_are_known_under_any_name(tmp_path, name):
    file = tmp_path / name
    state = {"a": torch.ones(2)}
    save_file(state, file)
    assert kind_of(file) is Kind.safetensors
    torch.save(state, file)
    assert kind_of(file) is Kind.torch_zip
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert kind_of(file) is Kind.torch_legacy
    file.write_text(json.dumps({"weight_map": {}}))
    assert kind_of(file) is Kind.index


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    os.symlink("/dev/zero", tmp_path / "zero.pth")
    for name in ("pipe.pth", "zero.pth"):
        with pytest.raises(SprintError, match="a pipe or a device"):
            kind_of(tmp_path / name)
    with pytest.raises(SprintError, match="is a folder"):
        kind_of(tmp_path)
