"""The scene score: does a picture of a built-in scene show what its caption says?"""

from collections.abc import Sequence

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics.metric import BINOMIAL, Choices, Drawn
from sprint.evaluate.metrics.registry import SCENES
from sprint.evaluate.prompts import Prompts, scene_prompts
from sprint.evaluate.result import Figure, Measured, Shot, Verdicts, share
from sprint.lab.scenes import SIZE, Claim
from sprint.lab.series import held_out_scenes


class SceneScore:
    """Do pictures show what captions of the built-in scenes say? Read from pixels, in GenEval's categories."""

    metric, size = SCENES, SIZE

    def __init__(self, choices: Choices, prompts: Prompts | NotHereError):
        """prompts   not looked at: it has its own"""
        self.prompts = scene_prompts(choices.count or choices.scenes, choices.seed)

    def find(self) -> Prompts:
        return self.prompts

    def open(self) -> None:
        try:
            import sprint.lab.reader  # noqa: F401 (scipy is optional)
        except SprintError as error:
            raise NotHereError(str(error)) from error

    def protocol(self) -> dict[str, str]:
        from sprint.lab.reader import RULES

        return {
            "pictures": self.prompts.words,
            "reader": RULES,
            "error": BINOMIAL,
        }

    def measure(self, drawn: Drawn) -> Measured:
        from sprint.lab.reader import check, read

        claims = [s.claim for s in held_out_scenes(len(drawn.prompts.shots))]
        pictures = (picture for batch in drawn.batches("scenes") for picture in batch)
        correct, reasons = [], []
        for picture, claim in zip(pictures, claims, strict=True):
            seen = read(picture)
            correct.append(check(seen, claim))
            reasons.append(seen_words(seen, claim))
        figures = {"scene score": share(sum(correct), len(correct))} | by_group(drawn.prompts.shots, correct)
        return Measured(figures, Verdicts(drawn.prompts.name, correct, reasons=reasons))


def seen_words(seen: Sequence, claim: Claim) -> str:
    """`Seen` objects in words, with sizes and places where the claim speaks of them."""
    from sprint.lab.reader import LARGE

    sized = any(noun.size for noun in claim.nouns)
    words = []
    for thing in seen:
        size = ("large " if thing.radius > LARGE else "small ") * sized
        place = f" at {thing.x:.0f}, {thing.y:.0f}" * bool(claim.relation)
        words.append(f"{size}{thing.color or 'unclear'} {thing.shape or 'scribble'}{place}")
    return "; ".join(words) or "nothing"


def by_group(shots: Sequence[Shot], correct: Sequence[bool]) -> dict[str, Figure]:
    """The share of each group, in the order in which they first occur."""
    groups: dict[str, list[bool]] = {}
    for shot, verdict in zip(shots, correct, strict=True):
        groups.setdefault(shot.group.replace("_", " "), []).append(verdict)
    return {name: share(sum(verdicts), len(verdicts)) for name, verdicts in groups.items()}
