"""The feature network of built-in scenes: what it gives, what it refuses, and that it sees damage."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from sprint.base.errors import SprintError
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.lab.features import (
    FEATURES,
    LARGEST_BATCH,
    RECORD,
    WEIGHTS,
    scene_features,
    training_record,
)
from sprint.lab.scenes import COLORS, SHAPES, render, scene
from tests.tolerance import assert_close, of_network
from tools.make.scene_features import (
    DAMAGES,
    NAME_COLORS,
    drawn_sets,
    fid_table,
    folded,
    hurt_sets,
    make_pool,
    ragged,
    scene_backbone,
    train,
)

PICTURES = 300


@pytest.fixture(scope="module")
def network():
    return scene_features()


@pytest.fixture(scope="module")
def sets():
    return hurt_sets(PICTURES)


@pytest.fixture(scope="module")
def real(network):
    return statistics(network, np.stack([render(scene(77, i).things) for i in range(900)]))


def statistics(network, pictures):
    result = GaussianStatistics()
    result.update(network(pictures))
    return result


# ---- what it gives --------------------------------------------------------------------------------------


def test_features_are_few_and_finite(network, sets):
    features = network(sets["real"][:5])
    assert features.shape == (5, FEATURES) and features.dtype == torch.float32 and not features.requires_grad
    assert torch.isfinite(features).all() and features.std(0).max() > 0.01
    assert isinstance(network.name, str) and network(sets["real"][:0]).shape == (0, FEATURES)


def test_features_do_not_depend_on_the_batch(network, sets):
    pictures = sets["real"][: LARGEST_BATCH + 3]
    together = network(pictures)
    alone = torch.cat([network(pictures[i : i + 1]) for i in (0, 1, len(pictures) - 1)])
    assert_close(together[[0, 1, -1]], alone, of_network(network.backbone))
    assert torch.equal(together, network(pictures)) and torch.equal(together, scene_features()(pictures))


@pytest.mark.parametrize(
    "pictures",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((2, 32, 32, 3), np.uint8),
        np.zeros((2, 32, 64, 3), np.uint8),
        np.zeros((2, 3, 64, 64), np.uint8),
        np.zeros((2, 64, 64, 3), np.float32),
    ],
)
def test_other_pictures_are_refused(network, pictures):
    with pytest.raises(SprintError, match=r"scene features: got .*; give uint8 \[B, 64, 64, 3\]"):
        network(pictures)


@pytest.mark.parametrize("content", [None, b"", WEIGHTS.read_bytes()[:-100], save({"a": torch.ones(1)})])
def test_damaged_file_is_one_line(tmp_path, content):
    file = tmp_path / "weights.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SprintError, match=r"weights\.safetensors.*install the package again") as error:
        scene_features(weights=file)
    assert "\n" not in str(error.value)


# ---- what it sees ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("ragged 0.2", 5),
        ("ragged 0.5", 100),
        ("mixed 0.2", 5),
        ("mixed 0.5", 30),
        ("blurred 0.5", 30),
        ("1 scene of 5 lacks an object", 2),
    ],
)
def test_damaged_scenes_are_farther_from_real_ones(network, sets, real, name, factor):
    """FID over that of whole scenes, of which there are as many."""
    floor = fid(statistics(network, sets["real"]), real)
    assert fid(statistics(network, sets[name]), real) > factor * floor


def test_more_damage_is_farther(network, sets, real):
    for name in DAMAGES:
        little, much = (fid(statistics(network, sets[f"{name} {amount}"]), real) for amount in (0.2, 0.5))
        assert little < much


# ---- how it was made -------------------------------------------------------------------------------------


def test_file_is_small_and_its_record_is_there():
    assert WEIGHTS.stat().st_size < 600_000
    weights = load_file(WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    record = training_record()
    assert record["parameters"] == sum(tensor.numel() for tensor in weights.values()) and RECORD.is_file()
    assert {"command", "seed", "versions", "held_out", "curve"} <= record.keys()


def test_no_damage_leaves_pictures_alone(sets):
    whole = torch.from_numpy(sets["real"][:4]).float()
    for damage in DAMAGES.values():
        same = damage(whole, torch.zeros(4), torch.Generator().manual_seed(0))
        assert torch.allclose(same, whole, atol=0.01), damage.__name__  # of 255 levels, which are whole
    some = ragged(whole, torch.tensor([0.0, 0.5, 0.5, 0.5]), torch.Generator().manual_seed(0))
    assert torch.allclose(some[0], whole[0], atol=0.01) and (some[1] - whole[1]).abs().max() > 50


def test_folding_changes_no_value():
    """Batch norm with statistics of its own, in eval mode, against the plain network."""
    torch.manual_seed(0)
    backbone = scene_backbone(batch_norm=True)
    x = torch.randn(4, 3, 64, 64)
    for _ in range(3):
        backbone(x + 0.5)
    backbone.eval()
    with torch.no_grad():
        assert_close(folded(backbone)(x), backbone(x), of_network(backbone))


def test_training_is_reproducible():
    pool = make_pool(5, 12)
    weights = [train(2, 4, pool, seed=3)[0].backbone.state_dict() for _ in "ab"]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_sets_of_a_model():
    sets = drawn_sets(["tiny:1"], 3, 2.0)
    assert list(sets) == ["real", "autoencoder", "teacher, 1 step"]
    assert {pictures.shape for pictures in sets.values()} == {(3, 64, 64, 3)}
    assert np.abs(sets["real"].astype(int) - sets["autoencoder"]).mean() < 5


def test_table_of_some_categories(network):
    """Of 12 scenes two are of each category; the reference is cut the same way."""
    sets = hurt_sets(12)
    sets["whole where it counts"] = np.where(
        np.isin(np.arange(12) % 6, (3, 5))[:, None, None, None], sets["real"], sets["ragged 0.5"]
    )
    table = fid_table(network, sets, NAME_COLORS)
    assert table["whole where it counts"] == table["real"] < table["ragged 0.5"]


def test_what_is_in_a_scene():
    pool = make_pool(5, 12)
    for i in range(12):
        things = scene(5, i).things
        shapes = [SHAPES.index(thing.shape) for thing in things]
        colors = [list(COLORS).index(thing.color) for thing in things]
        assert pool.counts[i].tolist() == [*map(shapes.count, range(4)), *map(colors.count, range(6))]
        assert set(pool.shapes[i].unique().tolist()) == {0, *(1 + shape for shape in shapes)}
        assert set(pool.colors[i].unique().tolist()) == {0, *(1 + color for color in colors)}
