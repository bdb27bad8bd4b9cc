"""Prompts without pictures: what the teacher draws for them, ahead and on the fly."""

import pytest
import torch

from sprint.base.errors import SprintError
from sprint.data.batch import Prompt
from sprint.data.batching import collate
from sprint.data.cache.items import CachedItems
from sprint.data.encode.draws import TeacherDraws, own_teacher
from sprint.data.encode.make import make_cache
from sprint.data.source import open_source
from sprint.models.families import load_family
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Data, DataKind
from sprint.sample.load import load_generator
from tests.tolerance import assert_close, of_network

pytest_plugins = "tests.cli.fixtures"

LINES = ["a red circle", "two blue squares", "a dot", "a green cross above a triangle", "a circle"]
PROMPTS = [Prompt(caption, position) for position, caption in enumerate(LINES)]


@pytest.fixture(scope="module")
def prompt_recipe(recipe, tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(LINES) + "\n")
    changes = [
        "data.kind=prompts",
        f"data.path={file}",
        "data.size=32",
        "data.teacher_steps=3",
        "data.seed=5",
    ]
    return load_recipe(recipe, changes)


@pytest.fixture(scope="module")
def family(prompt_recipe):
    return load_family(prompt_recipe.teacher, 80, False)


def load_draws(recipe, family) -> TeacherDraws:
    return TeacherDraws(own_teacher(recipe, family), recipe)


@pytest.fixture(scope="module")
def draws(prompt_recipe, family):
    return load_draws(prompt_recipe, family)


@pytest.fixture(scope="module")
def same(draws):
    """Whether latents are equal but for rounding: three steps of a guided teacher (w = 4.5) behind its text encoder."""
    generator = draws.teacher
    step = (2 * 4.5 + 1) * of_network(generator.view, generator.family.text_encoder)

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return (a - b).abs().max().item() < 3 * step * b.abs().max().item()

    return same


def test_a_prompt_s_latent_is_its_own(draws, same):
    """Not of its batch, its neighbours or its place there."""
    together = draws.latents_of(PROMPTS)
    assert together.shape == (5, 4, 8, 8) and together.dtype == torch.float32
    assert same(draws.latents_of(PROMPTS[3:]), together[3:])
    assert same(draws.latents_of(PROMPTS[::-1]), together.flip(0))
    draws.largest = 2
    assert same(draws.latents_of(PROMPTS), together)
    draws.largest = 0


def test_noise_is_of_seed_and_position(draws, same, prompt_recipe, family):
    dot = draws.latents_of([Prompt("a dot", 2)])
    assert not same(draws.latents_of([Prompt("a dot", 3)]), dot)
    prompt_recipe.data.seed = 6
    assert not same(load_draws(prompt_recipe, family).latents_of([Prompt("a dot", 2)]), dot)
    prompt_recipe.data.seed = 5
    assert same(load_draws(prompt_recipe, family).latents_of([Prompt("a dot", 2)]), dot)


def test_steps_and_guidance_are_the_recipe_s(draws, same, teacher):
    """The same as `sprint sample` with the noise of that prompt."""
    from sprint.base.random import step_generator

    seed = step_generator(5, "prompts", 2).initial_seed()
    sampled = load_generator(str(teacher)).latents(["a dot"], [seed], 3, 4.5, 32)
    assert same(draws.latents_of([Prompt("a dot", 2)]), sampled)
    assert not same(load_generator(str(teacher)).latents(["a dot"], [seed], 4, 4.5, 32), sampled)
    assert not same(load_generator(str(teacher)).latents(["a dot"], [seed], 3, 1.0, 32), sampled)


@pytest.mark.parametrize("command", [("data.kind=prompts",), ("--from-prompts",)])
def test_prompts_are_drawn_ahead_as_on_the_fly(sprint, recipe, prompt_recipe, draws, same, tmp_path, command):
    data = prompt_recipe.data
    changes = [f"data.path={data.path}", "data.size=32", "data.teacher_steps=3", "data.seed=5"]
    assert sprint("cache", recipe, *changes, *command, "--dtype", "fp32", "-o", tmp_path / "cache").code == 0
    cached_data = Data(kind=DataKind.cache, path=str(tmp_path / "cache"), size=32, seed=5)
    items = CachedItems(cached_data)
    assert set(items.settings.weights) == {"text_encoder", "vae", "teacher"}
    positions = range(3, 8)  # the end of an epoch, and the next
    online = draws.batch_of(open_source(data).samples(positions))
    cached = collate(open_source(cached_data).samples(positions), "cpu", max_length=80)
    assert same(cached.latent, online.latent) and torch.equal(cached.mask, online.mask)
    real = online.mask.bool()
    assert_close(cached.text[real], online.text[real], of_network(draws.teacher.family.text_encoder))


def test_a_size_that_does_not_divide_is_refused(prompt_recipe, tmp_path):
    prompt_recipe.data.size = 30
    with pytest.raises(SprintError, match="size 30 is not a multiple of 4 pixels"):
        make_cache(prompt_recipe, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    prompt_recipe.data.size = 32
