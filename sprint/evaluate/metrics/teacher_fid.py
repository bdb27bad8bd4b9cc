"""FID against the teacher: how far a student's pictures are from those that it was distilled from."""

from sprint.base.errors import NotHereError
from sprint.evaluate.metrics.fid import MJHQ_SIZE, drawn_features, picture_network
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.evaluate.metrics.metric import Choices, Drawn
from sprint.evaluate.metrics.registry import TEACHER_FID
from sprint.evaluate.prompts import SCENES, Prompts, needed
from sprint.evaluate.result import Measured
from sprint.lab.scenes import SIZE


class TeacherDistance:
    """FID of a column's pictures against the teacher's of the same prompts and seeds, at its own steps."""

    metric = TEACHER_FID

    def __init__(self, choices: Choices, prompts: Prompts | NotHereError):
        self.choices, self.prompts = choices, prompts
        self.scenes = isinstance(prompts, Prompts) and prompts.name == SCENES
        self.size = SIZE if self.scenes else None
        self.teacher: GaussianStatistics | None = None

    def find(self) -> Prompts:
        return needed(self.prompts)

    def open(self) -> None:
        self.network = picture_network(self.choices, self.scenes)

    def protocol(self) -> dict[str, str]:
        return {
            "pictures": self.prompts.words,
            "network": self.network.name,
            "against": f"the teacher's {len(self.prompts.shots)} pictures of the same prompts and seeds",
            "resize": "none" if self.scenes else f"both sets to {MJHQ_SIZE} px first, centre cut out",
        }

    def measure(self, drawn: Drawn) -> Measured:
        """No figure of the teacher itself."""
        if drawn.teacher is None:
            raise NotHereError("no teacher beside the student: give --teacher")
        if drawn.teacher.folder == drawn.store.folder:
            return Measured({})
        if self.teacher is None:
            theirs = Drawn(drawn.prompts, drawn.teacher, "teacher")
            self.teacher = GaussianStatistics.of(self._features(theirs))
        ours = GaussianStatistics.of(self._features(drawn))
        return Measured({"FID against the teacher": self.metric.figure(fid(ours, self.teacher))})

    def _features(self, drawn: Drawn):
        return drawn_features(self.network, drawn, self.scenes, self.choices.kept)
