"""Which series of scenes trains, which scores, which searches and which confirms: no two may meet.

A scene is named by its series and its number there, so what has its own series shares no scene with anything else.
"""

from sprint.base.errors import SprintError
from sprint.lab.scenes import Scene, scene

# What came before a run. Each tool's --seed counts from the first of its own.
AUTOENCODER_SEEDS = range(0, 1000)
TEACHER_SEEDS = range(1000, 1001)  # its tokenizer too
FEATURES_SEEDS = range(7000, 2**31)

HELD_OUT_SEED = 2000  # scores are taken on it
REFERENCE_SEED = 2001  # real pictures behind FID
FLOOR_SEED = 2002  # other real pictures, which a perfect generator's would be like

# The search for step lists.
SEARCH_SEED = 2101  # lists are chosen on it
CONFIRM_SEED = 2102  # the winner is judged on it
REAL_SEED = 2103  # real pictures behind its FID

TRAINING_SEEDS = range(3000, 7000)  # data.seed = s trains on the s-th of them

SERIES: dict[str, range] = {
    "autoencoder": AUTOENCODER_SEEDS,
    "teacher": TEACHER_SEEDS,
    "held out": range(HELD_OUT_SEED, HELD_OUT_SEED + 1),
    "reference": range(REFERENCE_SEED, REFERENCE_SEED + 1),
    "floor": range(FLOOR_SEED, FLOOR_SEED + 1),
    "search": range(SEARCH_SEED, SEARCH_SEED + 1),
    "confirm": range(CONFIRM_SEED, CONFIRM_SEED + 1),
    "real": range(REAL_SEED, REAL_SEED + 1),
    "training": TRAINING_SEEDS,
    "features": FEATURES_SEEDS,
}

SHOWN = 12  # held-out pictures on a page: two of each category


def training_seed(data_seed: int) -> int:
    """The series that a run with this data.seed trains on.

    Raises SprintError for a seed that has none: above the last one the FID network's begin.
    """
    if data_seed < 0:
        raise SprintError(f"data.seed = {data_seed}, but it must be at least 0")
    if data_seed >= len(TRAINING_SEEDS):
        raise SprintError(
            f"data.seed = {data_seed}, but scenes have {len(TRAINING_SEEDS)} series to train on"
        )
    return TRAINING_SEEDS[data_seed]


def held_out_scenes(count: int) -> list[Scene]:
    """The first `count` scenes of the series that is never trained on; categories take turns."""
    return [scene(HELD_OUT_SEED, i) for i in range(count)]
