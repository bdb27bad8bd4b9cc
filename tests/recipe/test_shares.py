"""One rule for batches: over processes, in whole groups of neighbours, in parts."""

from itertools import product

import pytest

from sprint.base.errors import SprintError
from sprint.data.batch import parts
from sprint.recipe.shares import check_shares, misfits, share_of
from tests.tiny import tiny_recipe


def recipe_of(batch_size: int, neighbours: int, micro_batch: int):
    recipe = tiny_recipe()
    recipe.distill.batch_size, recipe.micro_batch_size = batch_size, micro_batch
    recipe.distill.adversarial.neighbours = neighbours
    return recipe


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 12])
def test_shares_make_the_batch_in_order(processes):
    shares = [share_of(12, rank, processes) for rank in range(processes)]
    assert [place for share in shares for place in share] == list(range(12))
    assert {len(share) for share in shares} == {12 // processes}


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(SprintError, match=r"^adapt.batch_size = 8 does not divide over 3 processes$"):
        check_shares(tiny_recipe(), 3)
    recipe = tiny_recipe()
    recipe.adapt.steps = recipe.distill.steps = 0  # no batch is ever taken
    check_shares(recipe, 3)


def test_what_fits_leaves_no_neighbours_parted_and_none_alone():
    """Over every small batch: exactly those whose cuts lie between groups, and whose groups have two or more."""
    fitting = refused = 0
    for size, processes, neighbours, micro in product(range(1, 13), (1, 2, 3), (1, 2, 3, 4), (0, 2, 3, 4)):
        recipe = recipe_of(size, neighbours, micro)
        recipe.adapt.steps = 0
        if size % processes:
            assert list(misfits(recipe, processes))
            continue
        cuts = {
            share_of(size, rank, processes)[part.start]
            for rank in range(processes)
            for part in parts(size // processes, micro)
        }
        groups = [len(range(size)[start : start + neighbours]) for start in range(0, size, neighbours)]
        whole = all(cut % neighbours == 0 for cut in cuts) and min(groups) > 1
        found = list(misfits(recipe, processes))
        if not whole:
            assert found, (size, processes, neighbours, micro)
            refused += 1
        elif micro % neighbours == 0:
            assert not found, (size, processes, neighbours, micro, found)
            fitting += 1
    assert fitting > 50 and refused > 50


def test_a_micro_batch_that_parts_neighbours_is_named():
    with pytest.raises(SprintError, match=r"^micro_batch_size = 6, but it must be a multiple of distill"):
        check_shares(recipe_of(8, 4, 6), 1)
    recipe = recipe_of(8, 4, 6)
    recipe.distill.adversarial.weight = 0.0
    check_shares(recipe, 1)
