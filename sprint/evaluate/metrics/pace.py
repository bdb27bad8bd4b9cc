"""What a picture took while an evaluation drew it: a by-product, which no run has to draw again for."""

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics.metric import Choices, Drawn
from sprint.evaluate.metrics.registry import PACE
from sprint.evaluate.prompts import Prompts, needed
from sprint.evaluate.result import Measured


class Pace:
    """Milliseconds of text encoder, network and autoencoder, a picture, in the batches of the drawing."""

    metric, size = PACE, None

    def __init__(self, choices: Choices, prompts: Prompts | NotHereError):
        self.prompts = prompts
        self.batches: set[int] = set()

    def find(self) -> Prompts:
        return needed(self.prompts)

    def open(self) -> None:
        pass

    def protocol(self) -> dict[str, str]:
        most = ", ".join(map(str, sorted(self.batches)))
        parts = f"text encoder, network and autoencoder, in batches of at most {most}"
        return {"figures": f"{parts}; a mean over what was drawn"}

    def measure(self, drawn: Drawn) -> Measured:
        """Raises SprintError for pictures whose times nobody kept."""
        times = drawn.store.times()
        if times is None:
            raise SprintError(f"{drawn.store.folder}: was drawn without keeping times")
        self.batches.add(times.batch)
        return Measured({"drawing, ms a picture": self.metric.figure(1000 * times.seconds / times.pictures)})
