"""A tiny network, its original-layout file, and a folder to convert in."""

import pytest
import torch
from safetensors.torch import save_file

from tests.weights.convert_cases import network, to_original, with_buffers


@pytest.fixture(scope="module")
def net():
    return network()


@pytest.fixture(scope="module")
def original(net):
    torch.manual_seed(5)
    return with_buffers(to_original(net))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def file(here, original):
    save_file(original, "teacher.safetensors")
    return "teacher.safetensors"
