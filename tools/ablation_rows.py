"""The ablations as data: which keys a row changes, what the paper measured there, and when ours agrees.

Source of the paper's figures: SANA-Sprint (arXiv 2503.09641), FID and CLIP score of 2-step students.
Read by `ablations.py` and `ablation_page.py`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# 97.5% quantiles of Student's t by degrees of freedom; in between the lower number counts
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 20: 2.086}
STUDENT_T |= {30: 2.042, 60: 2.000, math.inf: 1.960}
ROUNDING = 1e-6  # of degrees of freedom
AGREES, DISAGREES, WITHIN_NOISE = "agrees", "disagrees", "within the noise"
NOT_COMPARABLE = "not comparable"
RULE = (
    "Each row is set against the base row of its group, at 2 steps: the sign of the difference in FID against the "
    "paper's in FID, in scene score against the paper's in CLIP score. A difference inside its 95% interval by "
    "Student's t, with Welch's degrees of freedom, is within the noise. A row's error is the standard error over its "
    "seeds; with one seed that within its run (binomial for the score, bootstrap over pictures for FID, over updates "
    "for norms) or the base's spread over seeds, whichever is larger. Errors of one seed are unpaired, though prompts "
    "and noise are the same for all rows: that is cautious. All groups share the same base runs, so their verdicts "
    "are not independent. Gradient norms are compared by the logarithm of a run's median."
)


@dataclass(frozen=True)
class Paper:
    """FID and CLIP score at 2 steps."""

    fid: float
    clip: float


@dataclass(frozen=True)
class Row:
    """One way of training.

    seeds    how many of 0, 1, 2, …
    worse    the paper says, without a figure of FID or CLIP, that this is worse than the base
    louder   … that its gradients are larger
    sparse   time is fed to the networks as 1000 · t, in stage 1 too
    updates  the share of the others' steps that it is trained for
    comparable   whether it is what the paper's row is; if not there is no verdict
    """

    label: str
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    paper: Paper | None = None
    worse: bool = False
    louder: bool = False
    sparse: bool = False
    updates: float = 1.0
    comparable: bool = True
    note: str = ""

    @property
    def is_base(self) -> bool:
        return not (self.overrides or self.sparse or self.updates != 1)


@dataclass(frozen=True)
class Group:
    """Rows that answer one question; the base is among them."""

    key: str
    title: str
    claim: str
    rows: tuple[Row, ...]

    @property
    def base(self) -> Row:
        return next(row for row in self.rows if row.is_base)


BASE_SEEDS = 3
WEIGHT = "distill.adversarial.weight"
CONSISTENCY, ADVERSARIAL = "distill.consistency", "distill.adversarial"


def _base(label: str, fid: float | None = None, clip: float | None = None) -> Row:
    return Row(label, seeds=BASE_SEEDS, paper=None if fid is None else Paper(fid, clip))


GROUPS = (
    Group(
        "losses",
        "Losses",
        "sCM and LADD together are better than either alone.",
        (
            Row(
                "sCM only",
                (f"{WEIGHT}=0",),
                3,
                comparable=False,
                note="every step is the student's: twice its updates with both losses, so no verdict",
            ),
            Row(
                "sCM, half steps",
                (f"{WEIGHT}=0",),
                3,
                Paper(8.93, 27.51),
                updates=0.5,
                note="as many updates of the student as with both losses",
            ),
            Row("LADD only", (f"{CONSISTENCY}.weight=0",), 3, Paper(12.20, 27.00)),
            _base("both", 8.11, 28.02),
        ),
    ),
    Group(
        "balance",
        "Weight of sCM : LADD",
        "1 : 0.5 has the best FID; 1 : 1 a CLIP score slightly above it.",
        (
            Row("1 : 1", (f"{WEIGHT}=1",), paper=Paper(8.81, 27.93)),
            _base("1 : 0.5", 8.43, 27.85),
            Row("1 : 0.1", (f"{WEIGHT}=0.1",), paper=Paper(8.90, 27.76)),
        ),
    ),
    Group(
        "max-time",
        "Share of LADD's samples that start from pure noise",
        "More is better, up to 70%.",
        (
            Row("0%", (f"{ADVERSARIAL}.max_time_probability=0",), 3, Paper(9.44, 27.65)),
            _base("50%", 8.32, 27.94),
            Row("70%", (f"{ADVERSARIAL}.max_time_probability=0.7",), 3, Paper(8.11, 28.02)),
        ),
    ),
    Group(
        "guidance",
        "Guidance embedding",
        "A student that is told the guidance scale is better.",
        (
            Row(
                "one scale, 4.5",
                ("distill.guidance_scales=[4.5]",),
                3,
                Paper(9.23, 27.15),
                comparable=False,
                note="trained for the one scale that it is scored at: a specialist, whose embedder is a constant; "
                "the paper does not say how its row was trained and scored, so its figures get no verdict",
            ),
            _base("on", 8.72, 28.09),
        ),
    ),
    Group(
        "qk-norm",
        "QK-norm",
        "Without it gradients are larger and training is unstable.",
        (
            Row("off", ("adapt.qk_norm=false",), worse=True, louder=True, note="stage 1 of its own"),
            _base("on"),
        ),
    ),
    Group(
        "time",
        "Dense and sparse time",
        "Sparse time (1000 · t) gives gradient norms above 10³ and collapses.",
        (
            Row(
                "sparse", worse=True, louder=True, sparse=True, note="stage 1 of its own; nothing is exported"
            ),
            _base("dense"),
        ),
    ),
    Group(
        "tangent-norm",
        "Tangent normalisation",
        "Part of sCM: without it training is unstable.",
        (Row("off", (f"{CONSISTENCY}.normalise_tangent=false",), worse=True), _base("on")),
    ),
    Group(
        "warm-up",
        "Tangent warm-up",
        "Part of sCM: without it the first updates are unstable.",
        (Row("off", (f"{CONSISTENCY}.tangent_warmup_updates=1",), worse=True, note="1 update"), _base("on")),
    ),
    Group(
        "density",
        "Time densities: mean of sCM's, mean of the discriminator's",
        "The text says 0.0 for sCM, the public configuration 0.2; neither gives figures.",
        (
            Row("sCM 0.0", (f"{CONSISTENCY}.time.mean=0.0",)),
            _base("0.2 and -0.6"),
            Row("sCM 0.8", (f"{CONSISTENCY}.time.mean=0.8",)),
            Row("LADD -1.2", (f"{ADVERSARIAL}.time.mean=-1.2",)),
            Row("LADD 0.0", (f"{ADVERSARIAL}.time.mean=0.0",)),
        ),
    ),
)


# ---- ours beside the paper's ------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One figure of a row: a value for each seed, and each value's error from within its run alone."""

    values: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, if there are several."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def freedom(self) -> float:
        """Degrees of freedom of `error`; one run's comes from many pictures or updates."""
        return len(self.values) - 1 if len(self.values) > 1 else math.inf

    @property
    def error(self) -> float:
        """Of the mean: over seeds, of a single one within its run."""
        return self.errors[0] if self.spread is None else self.spread / math.sqrt(len(self.values))


def verdict(row: Measured, base: Measured, expected: int) -> str:
    """Whether ours differs in the paper's direction.

    expected   1 where the paper's row is above its base, −1 where below, 0 where equal
    """
    difference = row.mean - base.mean
    if abs(difference) <= _uncertainty(row, base) or expected == 0:
        return WITHIN_NOISE
    return AGREES if difference * expected > 0 else DISAGREES


def _uncertainty(row: Measured, base: Measured) -> float:
    """Half of the difference's 95% interval, as `RULE` says."""
    if row.spread is None and base.spread is not None and base.spread > row.error:
        return _quantile(base.freedom) * math.hypot(base.spread, base.error)  # one estimate behind both
    variances = row.error**2, base.error**2
    scatter = sum(v**2 / m.freedom for v, m in zip(variances, (row, base), strict=True))
    freedom = sum(variances) ** 2 / scatter if scatter else math.inf  # Welch and Satterthwaite
    return _quantile(freedom) * math.sqrt(sum(variances))


def _quantile(freedom: float) -> float:
    return STUDENT_T[max(known for known in STUDENT_T if known <= max(freedom, 1) + ROUNDING)]


def expectations(row: Row, base: Row) -> dict[str, int]:
    """By measure ("fid", "score", "norm") the sign of the paper's difference from the base."""
    signs = {}
    if row.is_base or not row.comparable:
        return signs
    if row.paper and base.paper:
        signs |= {
            "fid": _sign(row.paper.fid - base.paper.fid),
            "score": _sign(row.paper.clip - base.paper.clip),
        }
    elif row.worse:
        signs |= {"fid": 1, "score": -1}
    return signs | ({"norm": 1} if row.louder else {})


NAMES = {"fid": "FID", "score": "scene score", "norm": "gradient norm"}


def verdicts(
    expected: Mapping[str, int], row: Mapping[str, Measured], base: Mapping[str, Measured]
) -> dict[str, str]:
    """`verdict` of every measure that the paper speaks of and both rows have."""
    return {m: verdict(row[m], base[m], sign) for m, sign in expected.items() if m in row and m in base}


def in_words(found: Mapping[str, str]) -> str:
    """{"fid": "agrees", "score": "within the noise"} -> "agrees in FID; within the noise in scene score"; the word
    alone where all measures have it."""
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    by_word = {
        word: [NAMES[m] for m in found if found[m] == word] for word in (AGREES, DISAGREES, WITHIN_NOISE)
    }
    return "; ".join(f"{word} in {' and '.join(names)}" for word, names in by_word.items() if names)


def chosen(keys: Sequence[str]) -> tuple[Group, ...]:
    """The groups of these keys, in their own order; all without keys."""
    return tuple(group for group in GROUPS if not keys or group.key in keys)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
