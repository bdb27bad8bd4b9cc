"""What a recipe and its teacher must fit in."""

import pytest

from sprint.recipe.load import load_recipe
from sprint.train.checks import unlearned_guidance


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], False),
        (["evaluate.guidance_scale=4"], False),
        (["distill.guidance_scales=[1.5,2]"], True),
        (["distill.guidance_scales=[1.5,2]", "evaluate.guidance_scale=1.7"], False),
        (["distill.guidance_scales=[1.5,2]", "evaluate.prompts=0"], False),
        (["evaluate.guidance_scale=3"], True),
    ],
)
def test_a_scale_outside_of_what_is_learned_is_told(overrides, told):
    assert bool(unlearned_guidance(load_recipe("tiny", overrides))) is told
