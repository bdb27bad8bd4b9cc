"""Which series of scenes trains, which scores, which searches and which confirms."""

from sprint.lab.scenes import Scene, scene

HELD_OUT_SEED = 2000  # the series of scenes that scores are taken on; never trained on
TRAINING_SEED = 3000  # data.seed = s trains on series 3000 + s
SHOWN = 12  # held-out pictures on a page: two of each category


def held_out_scenes(count: int) -> list[Scene]:
    """The first `count` scenes of the series that is never trained on; categories take turns."""
    return [scene(HELD_OUT_SEED, i) for i in range(count)]
