"""Real pictures found and refused, statistics read back, and features of files: resumed, and shared by processes."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed as dist
from torch import multiprocessing

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics import real as reference
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.evaluate.metrics.real import (
    RealPicture,
    RealStatistics,
    features_of,
    mjhq,
    open_reference,
    save_statistics,
)
from tests.data.picture_files import noise_bytes, png_of_claimed_size, write_pair
from tests.tolerance import near, rounding

ENTRIES = {  # not sorted: the order counts
    "b2": {"category": "people", "prompt": "a man"},
    "a1": {"category": "art", "prompt": "a vase"},
    "c3": {"category": "art", "prompt": "a print"},
}


def write_mjhq(folder: Path, pictures: str = "mjhq30k_imgs") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta_data.json").write_text(json.dumps(ENTRIES))
    for key, entry in ENTRIES.items():
        file = folder / pictures / entry["category"] / f"{key}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    return folder


# ---- finding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", ["mjhq30k_imgs", "imgs", "."])
def test_mjhq_in_the_order_of_its_metadata(tmp_path, pictures):
    folder = write_mjhq(tmp_path / "mjhq", pictures)
    expected = [
        RealPicture("b2", "a man", folder / pictures / "people" / "b2.jpg"),
        RealPicture("a1", "a vase", folder / pictures / "art" / "a1.jpg"),
        RealPicture("c3", "a print", folder / pictures / "art" / "c3.jpg"),
    ]
    assert mjhq(folder) == expected
    assert open_reference(str(folder)) == expected


def test_what_is_not_here_is_named_with_how_to_fetch_it(tmp_path):
    with pytest.raises(NotHereError, match=r"hf download playgroundai/MJHQ-30K.*unzip"):
        mjhq(tmp_path)
    with pytest.raises(NotHereError, match=r"no such file or folder.*hf download"):
        open_reference(tmp_path / "none")
    (tmp_path / "meta_data.json").write_text(json.dumps(ENTRIES))
    with pytest.raises(NotHereError, match="pictures are not here; hf download"):
        open_reference(tmp_path)
    (tmp_path / "mjhq30k_imgs.zip").touch()
    with pytest.raises(NotHereError, match=r"not unpacked; unzip mjhq30k_imgs\.zip -d mjhq30k_imgs$"):
        mjhq(tmp_path)


def test_half_unpacked_is_refused(tmp_path):
    folder = write_mjhq(tmp_path)
    (folder / "mjhq30k_imgs/art/c3.jpg").unlink()
    with pytest.raises(SprintError, match=r"art/c3\.jpg: missing, one of 1 of 3; unpack"):
        mjhq(folder)
    (folder / "mjhq30k_imgs/people/b2.jpg").unlink()
    (folder / "mjhq30k_imgs/people").rmdir()
    with pytest.raises(SprintError, match="one of 2 of 3"):
        mjhq(folder)


@pytest.mark.parametrize(
    "metadata",
    [
        "{",
        "[]",
        "{}",
        '{"a": {"category": "art"}}',
        '{"a": ["art", "a vase"]}',
        '{"a": {"category": "art", "prompt": 3}}',
        '{"a": {"category": "..", "prompt": "p"}}',
        '{"../a": {"category": "art", "prompt": "p"}}',
    ],
)
def test_metadata_of_another_kind_is_refused(tmp_path, metadata):
    write_mjhq(tmp_path)
    (tmp_path / "meta_data.json").write_text(metadata)
    with pytest.raises(SprintError, match=r"meta_data\.json: ") as raised:
        mjhq(tmp_path)
    assert not isinstance(raised.value, NotHereError)


def test_a_plain_folder_with_and_without_captions(tmp_path):
    write_pair(tmp_path, "b", caption=" a fox \n")
    write_pair(tmp_path, "deep/a").with_suffix(".txt").unlink()
    assert open_reference(tmp_path) == [
        RealPicture("b", "a fox", tmp_path / "b.png"),
        RealPicture("deep/a", None, tmp_path / "deep/a.png"),
    ]


def test_a_folder_or_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(SprintError, match="no pictures there"):
        open_reference(tmp_path)
    (tmp_path / "mjhq30k_imgs.zip").touch()
    with pytest.raises(SprintError, match="unpack it and give the folder"):
        open_reference(tmp_path / "mjhq30k_imgs.zip")
    write_pair(tmp_path, "a", caption="  ")
    with pytest.raises(SprintError, match=r"a\.txt: empty caption; mend it or remove it"):
        open_reference(tmp_path)


# ---- statistics -------------------------------------------------------------------------------------


def statistics(count=20, dim=3, seed=0):
    out = GaussianStatistics()
    out.update(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))
    return out


def test_our_statistics_come_back(tmp_path):
    kept = statistics()
    save_statistics(tmp_path / "real.safetensors", kept, "a network", 256)
    got = open_reference(tmp_path / "real.safetensors")
    assert (got.network, got.size, got.count) == ("a network", 256, 20)
    assert torch.equal(got.mean, kept.mean) and torch.equal(got.covariance, kept.covariance)
    other = statistics(seed=1)
    assert fid(got, other) == fid(kept, other) > 0


def test_statistics_of_another_network_or_size_are_refused(tmp_path):
    save_statistics(tmp_path / "s.safetensors", statistics(), "a network", None)
    got = open_reference(tmp_path / "s.safetensors")
    got.check("a network", None)
    with pytest.raises(SprintError, match="of a network, and the pictures of another"):
        got.check("another", None)
    with pytest.raises(SprintError, match="at 0 px, and these at 256"):
        got.check("a network", 256)
    RealStatistics(got.mean, got.covariance).check("whichever", 256)  # an .npz does not say


def test_statistics_as_the_field_ships_them(tmp_path):
    kept = statistics()
    np.savez(tmp_path / "ref.npz", mu=kept.mean.numpy(), sigma=kept.covariance.numpy())
    got = open_reference(tmp_path / "ref.npz")
    assert torch.equal(got.covariance, kept.covariance)
    assert (got.network, got.size, got.count) == (None, None, None)
    spread = kept.covariance.trace().item()
    assert fid(got, kept) == near(0, rounding(torch.float64, terms=3**2, steps=10), scale=spread)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.zeros((3, 4))},
        {"mu": np.zeros((1, 3)), "sigma": np.zeros((3, 3))},
        {"mu": np.full(3, math.nan), "sigma": np.zeros((3, 3))},
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(SprintError, match=r"ref\.npz: expected (finite|arrays) mu"):
        open_reference(tmp_path / "ref.npz")


def test_nothing_in_arrays_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    np.savez(tmp_path / "ref.npz", mu=np.array([Trap()]), sigma=np.zeros((1, 1)))
    with pytest.raises(SprintError, match=r"ref\.npz: expected arrays mu"):
        open_reference(tmp_path / "ref.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["s.npz", "s.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x93NUMPY"])
def test_damaged_statistics_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SprintError, match=f"{name}: "):
        open_reference(tmp_path / name)


# ---- features of files ------------------------------------------------------------------------------


class Means:
    """The mean of every channel, and the first pixel: which pictures came, in which order."""

    def __init__(self, name="means", fails_at=None):
        self.name, self.seen, self.fails_at = name, 0, fails_at

    def __call__(self, pictures):
        if self.seen == self.fails_at:
            raise KeyboardInterrupt
        self.seen += len(pictures)
        x = torch.from_numpy(pictures).float()
        return torch.cat([x.mean((1, 2)), x[:, 0, 0]], 1)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(reference, "FILES_AT_ONCE", 4)
    monkeypatch.setattr(reference, "BATCH", 2)
    monkeypatch.setattr(reference, "AHEAD", 3)


def write_pictures(folder: Path, count: int) -> list[Path]:
    return [write_pair(folder, f"p{k:02d}", color=(k, 2 * k, 3 * k)) for k in range(count)]


def expected_features(count: int) -> torch.Tensor:
    return torch.tensor([[k, 2 * k, 3 * k] * 2 for k in range(count)]).float()


def test_features_in_the_order_of_the_files(tmp_path, small_parts):
    files = write_pictures(tmp_path, 11)
    got = features_of(files, Means(), 8, tmp_path / "keep")
    assert torch.equal(got, expected_features(11))
    assert torch.equal(features_of(files[::-1], Means(), 8, tmp_path / "keep"), expected_features(11).flip(0))


def test_an_interruption_costs_a_part_and_no_more(tmp_path, small_parts):
    files, keep = write_pictures(tmp_path, 11), tmp_path / "keep"
    with pytest.raises(KeyboardInterrupt):
        features_of(files, Means(fails_at=6), 8, keep)
    again = Means()
    assert torch.equal(features_of(files, again, 8, keep), expected_features(11))
    assert again.seen == 7  # the first part was kept
    nothing = Means()
    assert torch.equal(features_of(files, nothing, 8, keep), expected_features(11))
    assert nothing.seen == 0


def test_what_is_of_something_else_is_made_anew(tmp_path, small_parts):
    files, keep = write_pictures(tmp_path, 11), tmp_path / "keep"
    length = files[5].stat().st_size

    def seen(files, size=8, name="means"):
        network = Means(name)
        features_of(files, network, size, keep)
        return network.seen

    assert seen(files) == 11
    assert seen(files, name="another") == 11
    assert seen(files, name="another", size=4) == 11
    assert seen(files, name="another", size=4) == 0
    Image.new("RGB", (8, 8), (5, 99, 15)).save(files[5])
    assert files[5].stat().st_size == length
    os.utime(files[5], ns=(1, 1))
    assert seen(files, name="another", size=4) == 4  # its part
    assert seen(files[:10], name="another", size=4) == 2  # the last part has lost one
    assert features_of(files[:10], Means("another"), 4, keep)[5, 1] == 99


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{torn"])
def test_a_damaged_part_is_made_anew(tmp_path, small_parts, content):
    files, keep = write_pictures(tmp_path, 6), tmp_path / "keep"
    features_of(files, Means(), 8, keep)
    parts = sorted(keep.iterdir())
    assert len(parts) == 2
    parts[1].write_bytes(content)
    again = Means()
    assert torch.equal(features_of(files, again, 8, keep), expected_features(6))
    assert again.seen == 2


def damaged(name: str) -> bytes:
    if name == "huge":
        return png_of_claimed_size(100_000, 100_000)
    return {
        "torn": noise_bytes("PNG")[:200],
        "text": b"not a picture",
        "program": b"%!PS-Adobe-3.0 EPSF-3.0",
    }[name]


@pytest.mark.parametrize("kind", ["torn", "text", "program", "huge"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, small_parts, kind):
    files = write_pictures(tmp_path, 6)
    files[4].write_bytes(damaged(kind))
    with pytest.raises(SprintError, match=r"p04\.png: cannot be read as a picture \(.*\); fetch it again"):
        features_of(files, Means(), 8, tmp_path / "keep")
    assert len(list((tmp_path / "keep").iterdir())) == 1  # the part before it was kept


def test_pictures_of_other_sizes_need_a_size(tmp_path):
    files = [*write_pictures(tmp_path, 2), write_pair(tmp_path, "wide", size=(12, 8))]
    with pytest.raises(SprintError, match=r"wide\.png: pictures of 8×8 and 12×8 px in one set; give a size"):
        features_of(files, Means(), None, tmp_path / "keep")
    assert len(features_of(files, Means(), 8, tmp_path / "keep")) == 3
    assert torch.equal(features_of(files[:2], Means(), None, tmp_path / "keep"), expected_features(2))
    with pytest.raises(SprintError, match="no pictures"):
        features_of([], Means(), None, tmp_path / "keep")


def in_a_process(rank: int, folder: Path, count: int) -> None:
    """Three runs of two processes: one to the end, one whose picture is torn, one that goes on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    reference.FILES_AT_ONCE, reference.BATCH = 4, 2
    files = sorted(folder.glob("p*.png"))
    network = Means()
    got = {"features": features_of(files, network, 8, folder / "keep"), "seen": network.seen}
    whole = files[6].read_bytes()
    dist.barrier()
    if rank == 0:
        files[6].write_bytes(b"torn")
    dist.barrier()
    try:
        features_of(files, Means(), 8, folder / "keep")
    except SprintError as error:
        got["said"] = str(error)
    if rank == 0:
        files[6].write_bytes(whole)
        next((folder / "keep").iterdir()).unlink()
    dist.barrier()
    got["again"] = features_of(files, Means(), 8, folder / "keep")
    torch.save(got, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_work_and_have_the_same_result(tmp_path, small_parts):
    files = write_pictures(tmp_path, 11)
    multiprocessing.spawn(in_a_process, (tmp_path, len(files)), nprocs=2)
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [one["seen"] for one in found] == [7, 4]
    alone = features_of(files, Means(), 8, tmp_path / "alone")
    for one in found:
        assert torch.equal(one["features"], alone)
        assert torch.equal(one["again"], alone)
        assert "p06.png: cannot be read" in one["said"]
