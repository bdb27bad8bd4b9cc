"""Inception's weights found and checked, its input, and the size that pictures are brought to."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sprint.base.errors import NotHereError, SprintError
from sprint.base.files import sha256
from sprint.evaluate.metrics import inception as features
from sprint.evaluate.metrics.inception import at_size, inception
from tests.tolerance import assert_close, of_network, rounding


class TinyInception(nn.Module):
    """As the library's class is on the outside: it loads its state, and gives a list of [B, D, 1, 1].

    Its features are of the upper half of the picture, so that rows are no columns.
    """

    BLOCK_INDEX_BY_DIM = {2048: 3}  # noqa: RUF012

    def __init__(self, output_blocks):
        super().__init__()
        assert output_blocks == [3]
        self.layer = nn.Conv2d(3, 4, 1)
        self.load_state_dict(
            sys.modules["pytorch_fid.inception"].load_state_dict_from_url("url", progress=True)
        )

    def forward(self, x):
        assert not torch.is_grad_enabled() and not self.training
        return [self.layer(x[:, :, : x.shape[2] // 2]).mean((2, 3), keepdim=True)]


def fetched(url, progress):
    raise AssertionError("the library must not fetch anything itself")


@pytest.fixture
def library(monkeypatch):
    """A stand-in for pytorch-fid."""
    package, module = ModuleType("pytorch_fid"), ModuleType("pytorch_fid.inception")
    package.inception, module.InceptionV3, module.load_state_dict_from_url = module, TinyInception, fetched
    monkeypatch.setitem(sys.modules, "pytorch_fid", package)
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", module)
    return module


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of torch hub, and no network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(features, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub" / "checkpoints"


def write_weights(path: Path, monkeypatch) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = nn.Conv2d(3, 4, 1).state_dict()
    torch.save({f"layer.{name}": tensor for name, tensor in state.items()}, path)
    monkeypatch.setattr(features, "WEIGHTS_SHA256", sha256(path))
    return state


def pictures(count=2, height=8, width=8):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_pictures_reach_the_network_in_its_own_scale(library, monkeypatch, tmp_path):
    state = write_weights(tmp_path / "w.pth", monkeypatch)
    x = pictures()
    got = inception(tmp_path / "w.pth", "cpu")(x)
    mean_B3 = torch.from_numpy(x[:, :4] / 255).mean((1, 2)).float()
    expected = mean_B3 @ state["weight"].flatten(1).T + state["bias"]
    assert got.dtype == torch.float32 and got.shape == (2, 4)
    assert_close(got, expected, rounding(torch.float32, terms=64, steps=2))


def test_the_library_is_left_as_it_was(library, monkeypatch, tmp_path):
    write_weights(tmp_path / "w.pth", monkeypatch)
    network = inception(str(tmp_path / "w.pth"), "cpu")
    assert library.load_state_dict_from_url is fetched
    assert "Inception" in network.name


@pytest.mark.parametrize("name", features.WEIGHTS_NAMES)
def test_weights_in_the_cache_of_either_library_are_found(library, cache, monkeypatch, name):
    write_weights(cache / name, monkeypatch)
    assert inception(None, "cpu")(pictures()).shape == (2, 4)


def test_weights_are_downloaded_and_checked_where_they_are_not_cached(library, cache, monkeypatch, tmp_path):
    write_weights(tmp_path / "remote.pth", monkeypatch)
    asked = []

    def download(url, file, hash_prefix):
        asked.append((url, hash_prefix))
        Path(file).write_bytes((tmp_path / "remote.pth").read_bytes())

    monkeypatch.setattr(features, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    inception(None, "cpu")
    inception(None, "cpu")
    assert asked == [(features.WEIGHTS_URL, features.WEIGHTS_SHA256)]


@pytest.mark.parametrize("failure", [OSError("no route"), RuntimeError("invalid hash value")])
def test_without_weights_the_line_names_the_address(library, cache, monkeypatch, failure):
    def download(url, file, hash_prefix):
        raise failure

    with pytest.raises(NotHereError, match=r"HF_HUB_OFFLINE.*https://github\.com/mseitzer"):
        inception(None, "cpu")
    monkeypatch.setattr(features, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(NotHereError, match=f"{failure}.*https://github.com/mseitzer.*checkpoints"):
        inception(None, "cpu")


def test_without_the_package_the_line_names_it_and_the_weights(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    with pytest.raises(
        NotHereError, match=r"pip install 'sprint-distill\[inception\]'.*weights: https://github.com"
    ):
        inception(None, "cpu")


def test_other_weights_are_refused_before_they_are_opened(library, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened"))
    (tmp_path / "w.pth").write_bytes(b"something else")
    with pytest.raises(SprintError, match=r"w\.pth: SHA-256 .* 6726825d"):
        inception(tmp_path / "w.pth", "cpu")
    with pytest.raises(SprintError, match=r"none\.pth: no such file"):
        inception(tmp_path / "none.pth", "cpu")


def test_nothing_in_the_weights_is_executed(library, monkeypatch, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"layer.weight": Trap()}, tmp_path / "w.pth")
    monkeypatch.setattr(features, "WEIGHTS_SHA256", sha256(tmp_path / "w.pth"))
    with pytest.raises(Exception, match="Weights only"):
        inception(tmp_path / "w.pth", "cpu")
    assert not (tmp_path / "sprung").exists()


def test_the_librarys_own_features():
    """Where pytorch-fid is installed: random weights, against the library called as its users call it."""
    library = pytest.importorskip("pytorch_fid.inception", exc_type=ImportError)
    state = {}
    fetch, load = library.load_state_dict_from_url, nn.Module.load_state_dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(nn.Module, "load_state_dict", lambda self, given: state.update(self.state_dict()))
        theirs = library.InceptionV3([3]).eval()
    x = pictures(2, 64, 48)
    got = features._Inception(features._build(library, state), "cpu")(x)
    expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2) / 255)[0]
    assert got.shape == (2, 2048)
    assert_close(got, expected.flatten(1), of_network(theirs))
    assert (library.load_state_dict_from_url, nn.Module.load_state_dict) == (fetch, load)


# ---- size -------------------------------------------------------------------------------------------


def stripes(width, height, colors):
    """Vertical stripes of equal width."""
    columns = np.repeat(np.arange(len(colors)), width // len(colors))
    return Image.fromarray(np.asarray(colors, np.uint8)[np.tile(columns, (height, 1))])


def test_the_shorter_side_counts_and_the_centre_stays():
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    wide = stripes(96, 32, (red, green, blue))
    got = np.asarray(at_size(wide, 32))
    assert got.shape == (32, 32, 3)
    assert (got == green).all()
    tall = np.asarray(at_size(wide.rotate(90, expand=True), 16))
    assert tall.shape == (16, 16, 3)
    assert (tall[2:-2] == green).all()  # at its rims the filter reaches the other stripes


def test_odd_sizes_round_as_torchvision_does():
    # 301 × 511 at 256: 256 × int(434.6) = 434, cut at round(89.0); 5 × 8 at 4: 4 × 6, cut at 1
    ramp = np.tile(np.arange(8, dtype=np.uint8)[:, None, None] * 30, (1, 5, 3))
    got = np.asarray(at_size(Image.fromarray(ramp), 4))
    resized = Image.fromarray(ramp).resize((4, 6), Image.Resampling.BILINEAR)
    assert (got == np.asarray(resized)[1:5]).all()
    assert at_size(Image.new("RGB", (301, 511)), 256).size == (256, 256)


def test_shrinking_is_antialiased():
    board = np.indices((64, 64)).sum(0) % 2 * 255
    got = np.asarray(at_size(Image.fromarray(np.stack([board] * 3, -1).astype(np.uint8)), 16))
    assert np.abs(got.astype(int) - 127).max() <= 2
