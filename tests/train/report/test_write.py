"""What a run's page says of its recipe."""

from dataclasses import fields, is_dataclass

import pytest

from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Distill
from sprint.train.report.write import OF_THE_METHOD, beside_the_paper, model_facts


def test_what_is_not_the_papers_is_said():
    distill = Distill(self_consistency=80.0, student_times=((1.5708, 0.85, 0.0),))
    distill.adversarial.weight, distill.consistency.time.mean = 10.0, 0.8
    assert beside_the_paper(distill) == (
        "Not as in the paper: consistency.time mean 0.8 std 1.6 (the paper: mean 0.2 std 1.6); "
        "adversarial.weight 10 (the paper: 0.5); self_consistency 80 (the paper: 0); "
        "student_times [[1.5708, 0.85, 0]] (the paper: none)."
    )


@pytest.mark.parametrize(
    ("overrides", "data"),
    [
        ([], "built-in scenes"),
        (["data={kind: cache, path: c}"], "the samples in c"),
        (["data={kind: prompts, path: p.txt}"], "the prompts in p.txt"),
        (
            ["data={kind: folder, path: p}", "distill.trajectories.states=4"],
            "the captions in p, and the teacher's trajectories for them",
        ),
    ],
)
def test_a_card_says_what_was_learned(overrides, data):
    assert model_facts(load_recipe("tiny", overrides))["data"] == data


@pytest.mark.parametrize("name", ["0.6b", "1.6b", "4.8b"])
def test_the_published_sizes_are_distilled_as_the_paper_does(name):
    assert beside_the_paper(load_recipe(name).distill) == ""


def test_every_setting_of_the_losses_is_looked_at():
    """A new one has to be put into the list, or here, where it is said why not."""
    not_of_the_method = {
        *("steps", "batch_size", "ema_decay", "optimizer"),
        *("consistency.tangent_warmup_updates", "consistency.tangent_normalisation"),
        *("adversarial.taps", "adversarial.neighbours", "adversarial.optimizer"),
        "depth",  # another sentence tells it, with the teacher's
        # the paper does not say; what the public trainer does stands in the large recipes
        *("adversarial.norm_groups", "adversarial.renoising", "null_mask"),
        # nothing without what is in the list
        *("adversarial.sigma", "matching.rollout", "matching.time", "matching.updates"),
        *("matching.lora_rank", "matching.optimizer"),
    }
    keys = set()
    for field in fields(Distill):
        value = getattr(Distill(), field.name)
        if field.name in ("consistency", "adversarial", "matching"):
            assert is_dataclass(value)
            keys |= {f"{field.name}.{inner.name}" for inner in fields(value)}
        else:
            keys.add(field.name)
    assert keys == {*OF_THE_METHOD} | not_of_the_method
