"""The ablations as data: which keys a row changes, what the paper measured there, and when ours agrees.

Source of the paper's figures: SANA-Sprint (arXiv 2503.09641), FID and CLIP score of 2-step students.
Read by the other files here.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

# 97.5% quantiles of Student's t by degrees of freedom; in between the lower number counts
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, math.inf: 1.960}
DECIMALS = 9  # of a difference: equal ones differ by rounding
AGREES, DISAGREES, WITHIN_NOISE = "agrees", "disagrees", "within the noise"
BETTER, WORSE = "better", "worse"
NOT_COMPARABLE = "not comparable"
RULE = (
    "Each row is set against the base row of its group, at 2 steps: the sign of the difference in FID against the "
    "paper's in FID, in scene score against the paper's in CLIP score. What is added to the paper's recipe is set "
    "against that at 1 step. A difference inside its 95% interval by Student's t is within the noise. Runs of the "
    "same seed share teacher, prompts and, where both losses are on, data and noise, so a row of several seeds is "
    "compared seed by seed: its interval is that of the mean of those differences, over seeds of this teacher and "
    "these prompts. A row of one seed is set against the base's mean, and its error is that within its run "
    "(binomial for the score, bootstrap over pictures for FID, over updates for norms) or the base's spread over "
    "seeds, whichever is larger: unpaired, which is cautious, but with a base of one seed too (--quick) nothing "
    "stands for the seeds. All groups share the same base runs, so their verdicts are not independent; of twenty at "
    "95% one leaves the noise by chance. Gradient norms are compared by the logarithm of a run's median."
)


BASES = ("ablations", "tiny-paper")  # recipes that rows are set against as they are


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
    recipe   the file in recipes/ that it changes
    points   shares of its updates, below 1, after which its student is scored too
    warmup   share of the student's updates that LADD's term is left out of
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
    recipe: str = "ablations"
    points: tuple[float, ...] = ()
    warmup: float = 0.0

    @property
    def is_base(self) -> bool:
        changed = self.overrides or self.sparse or self.updates != 1 or self.warmup
        return self.recipe in BASES and not changed


@dataclass(frozen=True)
class Group:
    """Rows that answer one question; the base is among them.

    claim  the paper's; where the changes are ours it has none
    steps  of the student, at which the rows are compared
    ours   whether the question is what is better, not whether the paper is right
    """

    key: str
    title: str
    claim: str
    rows: tuple[Row, ...]
    steps: str = "2"
    ours: bool = False

    @property
    def base(self) -> Row:
        return next(row for row in self.rows if row.is_base)


BASE_SEEDS = 8  # by tools/ablations/budget.py: 12 of the 22 comparisons are expected to leave the noise
FEW_SEEDS = 3  # of rows that have left it with one, or that the paper has no verdict on
WEIGHT = "distill.adversarial.weight"
CONSISTENCY, ADVERSARIAL = "distill.consistency", "distill.adversarial"


def _base(label: str, fid: float | None = None, clip: float | None = None) -> Row:
    return Row(label, seeds=BASE_SEEDS, paper=None if fid is None else Paper(fid, clip))


PAPER_GROUPS = (
    Group(
        "losses",
        "Losses",
        "sCM and LADD together are better than either alone.",
        (
            Row(
                "sCM only",
                (f"{WEIGHT}=0",),
                FEW_SEEDS,
                comparable=False,
                note="every step is the student's: twice its updates with both losses, so no verdict",
            ),
            Row(
                "sCM, half steps",
                (f"{WEIGHT}=0",),
                BASE_SEEDS,
                Paper(8.93, 27.51),
                updates=0.5,
                note="as many updates of the student as with both losses",
            ),
            Row(
                "LADD only",
                (f"{CONSISTENCY}.weight=0", f"{WEIGHT}=0.5"),
                BASE_SEEDS,
                Paper(12.20, 27.00),
                note="its weight says little where nothing stands beside it: Adam does not see the scale",
            ),
            _base("both", 8.11, 28.02),
        ),
    ),
    Group(
        "balance",
        "Weight of sCM : LADD",
        "1 : 0.5 has the best FID; 1 : 1 a CLIP score slightly above it.",
        (
            Row(
                "1 : 20",
                (f"{WEIGHT}=20",),
                BASE_SEEDS,
                Paper(8.81, 27.93),
                note="the paper's 1 : 1, times 20",
            ),
            _base("1 : 10", 8.43, 27.85),
            Row(
                "1 : 2",
                (f"{WEIGHT}=2",),
                BASE_SEEDS,
                Paper(8.90, 27.76),
                note="the paper's 1 : 0.1, times 20",
            ),
        ),
    ),
    Group(
        "max-time",
        "Share of LADD's samples that start from pure noise",
        "More is better, up to 70%.",
        (
            Row("0%", (f"{ADVERSARIAL}.max_time_probability=0",), BASE_SEEDS, Paper(9.44, 27.65)),
            _base("50%", 8.32, 27.94),
            Row("70%", (f"{ADVERSARIAL}.max_time_probability=0.7",), BASE_SEEDS, Paper(8.11, 28.02)),
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
                FEW_SEEDS,
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
            Row(
                "off",
                ("adapt.qk_norm=false",),
                BASE_SEEDS,
                worse=True,
                louder=True,
                note="stage 1 of its own",
            ),
            _base("on"),
        ),
    ),
    Group(
        "time",
        "Dense and sparse time",
        "Sparse time (1000 · t) gives gradient norms above 10³ and collapses.",
        (
            Row(
                "sparse",
                seeds=BASE_SEEDS,
                worse=True,
                louder=True,
                sparse=True,
                note="stage 1 of its own; nothing is exported",
            ),
            _base("dense"),
        ),
    ),
    Group(
        "tangent-norm",
        "Tangent normalisation",
        "Part of sCM: without it training is unstable.",
        (Row("off", (f"{CONSISTENCY}.normalise_tangent=false",), FEW_SEEDS, worse=True), _base("on")),
    ),
    Group(
        "warm-up",
        "Tangent warm-up",
        "Part of sCM: without it the first updates are unstable.",
        (
            Row("off", (f"{CONSISTENCY}.tangent_warmup_updates=1",), FEW_SEEDS, worse=True, note="1 update"),
            _base("on"),
        ),
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
    """One figure of a row: by seed a value, and its error from within that run alone."""

    values: Mapping[int, float]
    errors: Mapping[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, if there are several."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


def verdict(row: Measured, base: Measured, expected: int) -> str:
    """Whether ours differs in the paper's direction.

    expected   1 where the paper's row is above its base, −1 where below, 0 where equal
    """
    difference, interval = compare(row, base)
    if abs(difference) <= interval or expected == 0:
        return WITHIN_NOISE
    return AGREES if difference * expected > 0 else DISAGREES


def compare(row: Measured, base: Measured) -> tuple[float, float]:
    """row − base, and half of that difference's 95% interval, as `RULE` says."""
    shared = sorted(row.values.keys() & base.values.keys())
    differences = [round(row.values[seed] - base.values[seed], DECIMALS) for seed in shared]
    if len({*differences}) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(shared))
        return statistics.fmean(differences), _quantile(len(shared) - 1) * error
    return row.mean - base.mean, _unpaired(row, base)


def _unpaired(row: Measured, base: Measured) -> float:
    """Of rows that share no two seeds, or whose scores differ by the same number of pictures with each."""
    within = max(*row.errors.values(), *base.errors.values())
    spreads = [m.spread for m in (row, base) if m.spread is not None]
    seeds = max(len(row.values), len(base.values))
    error = max([within, *spreads]) * math.sqrt(1 / len(row.values) + 1 / len(base.values))
    return _quantile(seeds - 1 if spreads else math.inf) * error


def _quantile(freedom: float) -> float:
    return STUDENT_T[max(known for known in STUDENT_T if known <= freedom)]


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
        word: [NAMES[m] for m in found if found[m] == word]
        for word in (AGREES, DISAGREES, BETTER, WORSE, WITHIN_NOISE)
    }
    return "; ".join(f"{word} in {' and '.join(names)}" for word, names in by_word.items() if names)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
