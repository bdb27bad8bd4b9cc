"""The teacher's training: what a batch says, what the loss is, and that it goes on as if never interrupted."""

import argparse
from functools import partial

import numpy as np
import pytest
import torch

from sprint.base.products import float32_products
from sprint.lab.scenes import BACKGROUND, SIZE, render, scene
from sprint.lab.series import TEACHER_SEEDS, held_out_scenes
from tests.tolerance import assert_close, growing, of_network
from tools.make import autoencoder, parts, teacher, verdict
from tools.make.parts import MAX_LENGTH, build_network
from tools.make.teacher import (
    PLAIN,
    TOLD,
    Training,
    cached_scenes,
    captions_of,
    draw_batch,
    learning_rate,
    train_step,
)

SCENES, STEPS, BATCH = 12, 4, 4


# ---- what it learns from ----------------------------------------------------------------------------


def test_the_first_caption_is_the_scenes_own_and_the_others_are_told_anew():
    for index in range(12):
        told = captions_of(TEACHER_SEEDS[0], index)
        assert len(told) == TOLD and told[0] == scene(TEACHER_SEEDS[0], index).caption
        assert told == captions_of(TEACHER_SEEDS[0], index)
    assert len({caption for index in range(12) for caption in captions_of(TEACHER_SEEDS[0], index)}) > 24


def test_a_batch_holds_each_scenes_own_latent_and_one_of_its_captions():
    scenes = 50
    latent = torch.arange(scenes, dtype=torch.float16)[:, None, None, None]
    ids = torch.arange(scenes)[:, None, None] * 10 + torch.arange(TOLD)[:, None]
    data = {"latent": latent, "ids": ids, "mask": ids + 1}
    got, ids, mask = draw_batch(data, 20000, torch.Generator().manual_seed(0))
    assert got.dtype == torch.float32 and (ids // 10 == got[:, 0, 0].long()).all() and (mask == ids + 1).all()
    shares = torch.bincount(ids.flatten() % 10, minlength=TOLD) / len(ids)
    expected = [PLAIN, *[(1 - PLAIN) / (TOLD - 1)] * (TOLD - 1)]
    assert shares.tolist() == pytest.approx(expected, abs=5 * 0.5 / 20000**0.5)  # five standard errors


def test_the_loss_is_that_of_flow_matching():
    """A model that knows the latents gives the velocity exactly; one that errs by 2 everywhere a loss of 4."""
    generator = torch.Generator().manual_seed(0)
    latent, ids = torch.randn(8, 2, 4, 4), torch.ones(8, 3, dtype=torch.long)
    null = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)

    def loss(error):
        def model(x_fm, t_fm, ids, mask):
            return (x_fm - latent) / t_fm[:, None, None, None] + error

        return train_step(model, (latent, ids, ids), null, generator, "cpu").item()

    assert loss(0.0) < 1e-8
    assert loss(2.0) == pytest.approx(4.0, rel=1e-4)


def test_a_tenth_of_the_captions_is_dropped():
    seen = []

    def model(x_fm, t_fm, ids, mask):
        seen.append((ids, mask))
        return x_fm

    ids, mask = torch.full((4000, 3), 7), torch.ones(4000, 3, dtype=torch.long)
    null = torch.tensor([[2, 0, 0]]), torch.tensor([[1, 0, 0]])
    train_step(model, (torch.zeros(4000, 1, 1, 1), ids, mask), null, torch.Generator().manual_seed(0), "cpu")
    dropped = (seen[0][0] == null[0]).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=5 * (0.09 / 4000) ** 0.5)
    assert (seen[0][1][dropped] == null[1]).all() and (seen[0][1][~dropped] == 1).all()


def test_the_rate_is_the_same_whatever_the_steps_until_the_last_fifth():
    assert [learning_rate(step, 1000) for step in range(200, 801, 100)] == [1.0] * 7
    assert [learning_rate(step, 5000) for step in range(900)] == [
        learning_rate(step, 9000) for step in range(900)
    ]
    assert learning_rate(900, 1000) == 0.5 and learning_rate(999, 1000) == pytest.approx(1 / 200)


# ---- it resumes ---------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(teacher, "build_network", partial(build_network, depth=1, width=32))
    monkeypatch.setattr(teacher, "TOKENIZER_SCENES", 50)


def training(folder, steps=STEPS) -> Training:
    args = argparse.Namespace(out=folder, steps=steps, batch=BATCH, lr=1e-3, seed=0, device="cpu")
    torch.manual_seed(0)
    return Training(args, autoencoder.build().eval().requires_grad_(False))


def updates(of: Training, count: int) -> list[float]:
    data = cached_scenes(of.args.out / "scenes.pt", of.family, SCENES)
    null = teacher.tokenize(of.family.tokenizer, [""], MAX_LENGTH, False)[:2]
    null = [part[:, : data["ids"].shape[2]] for part in null]
    return [of.update(data, null).item() for _ in range(count)]


def test_it_goes_on_where_it_was(small, tmp_path):
    """Losses of the right batches and noise differ by rounding alone, those of others by far more."""
    whole = training(tmp_path)
    expected, near = updates(whole, STEPS), of_network(whole.teacher, passes=3)
    first = training(tmp_path)
    assert updates(first, 2) == growing(expected[:2], near)
    first.curve.append({"step": 2})
    first.save()
    second = training(tmp_path)
    second.resume()
    assert (second.step, second.curve) == (2, [{"step": 2}]) and second.seconds > 0
    assert updates(second, 2) == growing(expected[2:], near, done=2)
    assert updates(second, 1) != growing(expected[3:], near, done=4)


def test_scenes_are_encoded_once_with_all_their_captions(small, tmp_path):
    one = training(tmp_path)
    data = cached_scenes(tmp_path / "scenes.pt", one.family, SCENES)
    assert data["latent"].shape == (SCENES, 8, 8, 8) and data["ids"].shape == (SCENES, TOLD, 16)
    pictures = np.stack([render(scene(TEACHER_SEEDS[0], i).things) for i in range(SCENES)])
    half = 2 * torch.finfo(torch.float16).eps
    assert_close(data["latent"].float(), one.family.encode_pictures(pictures), half)
    words = one.family.tokenizer.decode(data["ids"][5, 0][data["mask"][5, 0] > 0][1:])
    assert words.replace("▁", " ").strip() == scene(TEACHER_SEEDS[0], 5).caption
    before = (tmp_path / "scenes.pt").stat().st_mtime_ns
    cached_scenes(tmp_path / "scenes.pt", one.family, SCENES)
    assert (tmp_path / "scenes.pt").stat().st_mtime_ns == before


# ---- its verdict --------------------------------------------------------------------------------------


def test_what_it_draws_depends_on_prompt_and_seed_alone(small, tmp_path, monkeypatch):
    one = training(tmp_path)
    view = one.teacher.view().eval()
    pictures = verdict.drawn(view, one.family, 5, 2.0, steps=1)
    assert pictures.shape == (5, SIZE, SIZE, 3) and pictures.dtype == np.uint8
    monkeypatch.setattr(verdict, "AT_ONCE", 2)
    again = verdict.drawn(view, one.family, 4, 2.0, steps=1)
    levels = 255 * of_network(view, one.family.autoencoder)
    assert np.abs(again.astype(int) - pictures[:4]).max() <= max(1, levels)
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 1


def test_the_best_guidance_is_the_one_whose_pictures_are_right(monkeypatch):
    blank = np.full((12, SIZE, SIZE, 3), BACKGROUND, np.uint8)
    right = np.stack([render(s.things) for s in held_out_scenes(12)])
    some = np.concatenate([right[:6], blank[:6]])
    of = {1.0: blank, 1.5: some, 2.0: right, 3.0: some, 4.5: blank}
    monkeypatch.setattr(verdict, "drawn", lambda view, family, prompts, guidance: of[guidance])
    monkeypatch.setattr(verdict, "real_statistics", partial(verdict.real_statistics, count=50))

    class Anywhere:
        device = "cpu"

    found = verdict.guidance_curve(None, Anywhere(), 12)
    assert found["best_guidance"] == 2.0 and list(found["curve"]) == ["1", "1.5", "2", "3", "4.5"]
    assert [found["curve"][w]["mean_over_samples"] for w in found["curve"]] == [0, 0.5, 1, 0.5, 0]
    assert found["curve"]["2"]["fid"] < found["curve"]["3"]["fid"] < found["curve"]["4.5"]["fid"]


def test_a_hastened_teacher_is_the_same_and_comes_apart_as_diffusers_has_it(small, tmp_path, monkeypatch):
    monkeypatch.setattr(
        parts, "compile_blocks", lambda network: None
    )  # that graphs are right is tested elsewhere
    monkeypatch.setattr(parts, "fastest_products", float32_products)
    one = training(tmp_path).teacher.requires_grad_(False)
    batch = torch.randn(3, 8, 8, 8), torch.rand(3), torch.randint(5, 90, (3, 16)), torch.ones(3, 16)
    expected = one(*batch)
    weights = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    one.hasten()
    assert_close(one(*batch), expected, of_network(one))
    assert one.network.transformer_blocks[0].ff.__dict__.keys() >= {"forward"}
    plain = one.unhastened()
    assert "forward" not in plain.network.transformer_blocks[0].ff.__dict__
    assert {name: tensor.dtype for name, tensor in plain.state_dict().items()} == dict.fromkeys(
        weights, torch.float16
    )
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, weights[name].half()), name
