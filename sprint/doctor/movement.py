"""Did training move the weights? What a student's distance from its teacher says."""

import math

import torch

from sprint.doctor.findings import Finding, note, ok, wrong
from sprint.doctor.weights import Comparison, Part, names_of

ABOUT = "movement"
HARDLY = 1e-4  # of the teacher's norm: one update of 2e-6 on weights of 0.02
BELOW_BF16 = 2**-9  # half of bfloat16's spacing, relative: what rounding to it takes away
LOST = 0.5  # share of numbers that are the teacher's bit for bit; a single update of AdamW or CAME moves all
ANOTHER = 1.0  # distance from which on the two have nothing to do with each other

LOST_UPDATES = (
    "updates of this size vanish when weights are trained in half precision (bf16 keeps 8 bits: at lr 2e-6 a "
    "weight of 0.02 needs 4e-5 to change); train float32 weights under autocast, as sprint does"
)
NO_UPDATE = (
    "either every update was skipped (look for gradients or losses that are nan or inf, for a GradScaler that "
    "overflows), or lr × update rounds to nothing in half-precision weights, or another network was saved than "
    "the one that was trained (the teacher, or an average that never moved)"
)


def movement(found: Comparison, teacher: str, what: str = "the student") -> list[Finding]:
    """teacher   its name, for the text"""
    if not found.parts:
        shared = "no tensor of the same name and shape"
        return [wrong(ABOUT, f"{shared} in {teacher}", "give the teacher that it was distilled from")]
    if not math.isfinite(found.whole.distance):
        return []  # weights that are not finite, of which there is a finding of its own
    strangers = []
    if found.other_shape:
        count = len(found.other_shape)
        strangers.append(
            wrong(
                ABOUT,
                f"{count} tensors have another shape in {teacher}: {names_of(found.other_shape)}",
                "give the teacher of this size",
            )
        )
    return [*strangers, _moved(found, teacher, what), *_still(found), *_new(found, teacher)]


def _moved(found: Comparison, teacher: str, what: str) -> Finding:
    whole, rounding = found.whole, _rounding(found.rounded_to)
    if whole.same_numbers == whole.numbers:
        return wrong(
            ABOUT,
            f"{what}'s weights are {teacher}'s, bit for bit{rounding}: no update was kept "
            f"({whole.tensors} tensors compared)",
            NO_UPDATE,
        )
    same = whole.same_numbers / whole.numbers
    far = f"{whole.distance:.2g} of its norm away from {teacher}"
    if whole.distance > ANOTHER:
        return wrong(
            ABOUT,
            f"{what} is {far}: as far as another network",
            "give the teacher that it was distilled from; if that is it, the run diverged: lower the learning "
            "rate and go back to an earlier checkpoint",
        )
    if same > LOST:
        said = f"{same:.0%} of {what}'s numbers are still {teacher}'s, bit for bit{rounding}"
        if found.rounded_to or whole.distance < BELOW_BF16:
            return wrong(ABOUT, f"{said} ({far})", LOST_UPDATES)
        return note(ABOUT, f"{said} ({far})", f"parts of it may be frozen; if none should be: {LOST_UPDATES}")
    if whole.distance < HARDLY:
        return wrong(
            ABOUT,
            f"{what} has hardly moved: {far}; {same:.0%} of its numbers are the same bit for bit{rounding}",
            f"a student this near its teacher draws as a teacher in so few steps does; {NO_UPDATE}",
        )
    text = f"{what} is {far}: {', '.join(_by_part(found))}"
    if whole.distance < BELOW_BF16:
        return note(ABOUT, text, "less than bfloat16 resolves: sample it in fp32, and train longer")
    return ok(ABOUT, text)


def _still(found: Comparison) -> list[Finding]:
    """Parts that stayed as they were while others moved."""
    still = [name for name, part in found.parts.items() if part.same_tensors == part.tensors]
    if not still or len(still) == len(found.parts):
        return []
    return [note(ABOUT, f"unchanged bit for bit: {', '.join(still)}", "nothing to do if they were frozen")]


def _new(found: Comparison, teacher: str) -> list[Finding]:
    if not found.only_here and not found.only_there:
        return []
    text = []
    if found.only_here:
        text.append(f"{len(found.only_here)} tensors that {teacher} lacks: {names_of(found.only_here)}")
    if found.only_there:
        text.append(f"{len(found.only_there)} of {teacher}'s are not there: {names_of(found.only_there)}")
    return [ok("new tensors", "; ".join(text))]


def _by_part(found: Comparison) -> list[str]:
    """ "attn 0.03", the farthest first"""
    parts: list[tuple[str, Part]] = sorted(found.parts.items(), key=lambda item: -item[1].distance)
    return [f"{name} {part.distance:.2g}" for name, part in parts]


def _rounding(dtype: torch.dtype | None) -> str:
    return f" (both rounded to {str(dtype).removeprefix('torch.')})" if dtype else ""
