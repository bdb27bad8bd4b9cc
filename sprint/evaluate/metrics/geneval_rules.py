"""GenEval's rules (arXiv 2310.11513) on objects that a detector has found: what counts as a correct picture.

Numbers, order and arithmetic are those of the authors' program (github.com/djghosh13/geneval, version of
2025-03-03: evaluation/evaluate_images.py and summary_scores.py). Nothing here looks at pixels: objects come
from a detector and colours from a classifier, whichever the caller has.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sprint.base.errors import SprintError

# Categories and how many prompts each has in the official file; each prompt is drawn `PICTURES` times.
PROMPTS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
PICTURES = 4

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# COCO's classes in COCO's order, as the official prompts spell them.
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on

MIN_SCORE = 0.3  # an object must score more
MIN_SCORE_COUNTING = 0.9  # and more than this where objects are counted
MAX_OBJECTS = 16  # of one class, the best first
POSITION_MARGIN = 0.1  # of both objects' extents together: centres closer than this are in line
POSITION_COSINE = 0.5  # "left of" reaches 60° up and down
IN_LINE = 1e-3  # pixels


@dataclass(frozen=True)
class Detection:
    """One object found.

    box    (x1, y1, x2, y2) in pixels, the far edges exclusive
    score  in [0, 1]
    mask   bool [H, W] of the whole picture, or None
    """

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Requirement:
    """`count` objects of a class, each of a colour, each standing in a relation to those of another.

    name      one of `CLASSES`
    position  (one of `RELATIONS`, index among the task's included objects of what it is relative to)
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Task:
    """A prompt and what its picture must show (all of `include`) and must not (any of `exclude`)."""

    tag: str
    prompt: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """`reason` says what is wrong, a line for each thing; it is empty where the picture is correct."""

    correct: bool
    reason: str


# Class name and its most confident objects  -> a colour name for each.
ColorClassifier = Callable[[str, Sequence[Detection]], Sequence[str]]


def judge(
    task: Task, detections: Mapping[str, Sequence[Detection]], classify_colors: ColorClassifier
) -> Verdict:
    """Does a picture show what its prompt says?

    detections       every object found, by class name, in the detector's order, which decides between equal scores
    classify_colors  is asked only about objects whose colour matters

    As in the official program: colour and position are looked at on the `count` most confident objects of a
    class alone; every one must have the colour, and every pair the relation. A thing that fails is no target
    for another's position. Objects that nobody asked for do no harm, except what `exclude` forbids: counting
    prompts include n and exclude n + 1. (The program could suppress overlapping boxes; its default does not.)
    """
    limit = MIN_SCORE_COUNTING if task.tag == "counting" else MIN_SCORE
    seen = {name: _most_confident(found, limit) for name, found in detections.items()}
    reasons: list[str] = []
    targets: list[Sequence[Detection] | None] = []  # for each of `include`: its objects, None where it failed
    for wanted in task.include:
        found = seen.get(wanted.name, [])[: wanted.count]
        reason = _check(wanted, found, targets, classify_colors)
        targets.append(found if reason is None else None)
        reasons += [reason] if reason else []
    for unwanted in task.exclude:
        count = len(seen.get(unwanted.name, []))
        if count >= unwanted.count:
            reasons.append(f"expected {unwanted.name}<{unwanted.count}, found {count}")
    return Verdict(not reasons, "\n".join(reasons))


def _most_confident(found: Sequence[Detection], limit: float) -> list[Detection]:
    """Best first; of equal ones the later first, since the official program turns a rising order round."""
    kept = [d for d in found if d.score > limit]
    return sorted(kept, key=lambda d: d.score)[: -MAX_OBJECTS - 1 : -1]


def _check(
    wanted: Requirement,
    found: Sequence[Detection],
    targets: Sequence[Sequence[Detection] | None],
    classify_colors: ColorClassifier,
) -> str | None:
    """What is wrong with the `count` most confident objects of a class; None if nothing is."""
    name, count = wanted.name, wanted.count
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if wanted.color is not None:
        colors = list(classify_colors(name, found))
        right = colors.count(wanted.color)
        if right < count:
            tally = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
            return f"expected {wanted.color} {name}>={count}, found {right} {wanted.color}; and {tally}"
    if wanted.position is not None:
        relation, target = wanted.position
        if targets[target] is None:
            return f"no target for {name} to be {relation}"
        for a in found:
            for b in targets[target]:
                relations = relative_position(a.box, b.box)
                if relation not in relations:
                    actual = " and ".join(r for r in RELATIONS if r in relations) or "no side of"
                    return f"expected {name} {relation} target, found {actual} target"
    return None


def relative_position(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box `a` lies as seen from box `b`: none, one or two of `RELATIONS`. y grows downwards.

    The offset of the centres is shortened in each direction by a tenth of both extents together, and then
    divided by the length of the *unshortened* offset; more than 0.5 of that in a direction is a relation.
    """
    corners = np.array([a, b], float).reshape(2, 2, 2)  # box, near and far corner, x and y
    center_a, center_b = corners.mean(1)
    extent_a, extent_b = np.abs(corners[:, 1] - corners[:, 0])
    offset = center_a - center_b
    shortened = np.maximum(np.abs(offset) - POSITION_MARGIN * (extent_a + extent_b), 0) * np.sign(offset)
    if (np.abs(shortened) < IN_LINE).all():
        return set()
    x, y = shortened / np.linalg.norm(offset)
    cosines = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {relation for relation, cosine in cosines.items() if cosine > POSITION_COSINE}


def summary(tasks: Sequence[Task], verdicts: Sequence[Verdict]) -> dict:
    """Scores of judged pictures, for JSON.

    tasks, verdicts [N]: one for each picture, so that a task stands there as often as it was drawn.

    overall   the official score: each category's share of correct pictures, then the mean of the categories
    tags      by category: share, correct, pictures
    images    share of correct pictures;  prompts: share of prompts with at least one correct picture
    official  whether these are as many prompts of each category as the official 553, four pictures of each
    by_prompt  prompt, tag, correct, pictures, in the order in which the prompts first come
    Raises SprintError where there is nothing to score or the lengths differ.
    """
    if not tasks or len(tasks) != len(verdicts):
        raise SprintError(
            f"GenEval: {len(tasks)} tasks and {len(verdicts)} verdicts; give one of each for every picture"
        )
    by_task, by_tag = defaultdict(list), defaultdict(list)
    for task, verdict in zip(tasks, verdicts, strict=True):
        by_task[task].append(verdict.correct)
        by_tag[task.tag].append(verdict.correct)
    shares = {tag: sum(correct) / len(correct) for tag, correct in by_tag.items()}
    return {
        "overall": sum(shares.values()) / len(shares),
        "tags": {
            tag: {"share": shares[tag], "correct": sum(by_tag[tag]), "pictures": len(by_tag[tag])}
            for tag in PROMPTS
            if tag in by_tag
        },
        "images": sum(v.correct for v in verdicts) / len(verdicts),
        "prompts": sum(any(correct) for correct in by_task.values()) / len(by_task),
        "official": is_official(tasks),
        "by_prompt": [
            {"prompt": task.prompt, "tag": task.tag, "correct": sum(correct), "pictures": len(correct)}
            for task, correct in by_task.items()
        ],
    }


def is_official(tasks: Sequence[Task]) -> bool:
    """Whether these are as many prompts of each category as the official ones, each standing there `PICTURES` times."""
    times = Counter(tasks)
    return Counter(task.tag for task in times) == PROMPTS and set(times.values()) == {PICTURES}
