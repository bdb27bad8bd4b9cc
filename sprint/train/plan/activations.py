"""What an update holds on top of weights and optimizer state, at the moments that may be its highest.

What a block keeps or works with, the teacher's family says.
"""

from dataclasses import dataclass

from sprint.models.teacher import Footprint
from sprint.recipe.schema import Precision

FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class Update:
    """One micro-batch of an update. Its methods give moments that may be the highest, in bytes on top of weights,
    gradients and bf16 copies of weights.

    Gradients are not there until the first backward pass makes them, copies not while blocks are recomputed; such
    a moment has that much less.
    """

    per: Footprint
    precision: Precision
    recomputed: bool  # activation checkpointing: a block keeps its input alone
    pictures: int
    width: int
    depth: int  # blocks of the trained network
    teacher_depth: int
    tokens: int
    text_tokens: int
    text_width: int
    taps: tuple[int, ...]
    kinds: int  # of picture that the discriminator's update sees: real, fake, misaligned, with noise for R1 and R2
    copies: float  # bytes of bf16 copies, which autocast makes of trained weights
    first_gradients: float  # bytes that the first backward pass adds; 0 where gradients accumulate

    def trained_pass(self, tangent: bool, first: bool) -> list[float]:
        """One pass of the trained network and its backward; `first`: no gradient is there before."""
        absent = self.first_gradients if first else 0
        last_block = self._block + self.per.backward * self._cells - self.copies  # all gradients are there
        if self.recomputed:
            forward = self.per.recomputed_tangent * self._cells if tangent else 0
            return [self._kept + forward - absent, self._kept + last_block - absent, last_block]
        working = max(self.per.tangent if tangent else 0, self.per.backward)
        return [self._kept + working * self._cells - absent, last_block]

    def flow(self) -> list[float]:
        """Stage 1: prompts, of which some gave way to the null prompt, and one pass."""
        prompts = FP32 * self.pictures * self.text_tokens * self.text_width
        return [prompts + moment for moment in self.trained_pass(tangent=False, first=True)]

    def consistency(self) -> list[float]:
        """The teacher with and without its prompts, both in one pass; then the student."""
        teacher = 2 * self.per.no_grad * self._cells - self.copies - self.first_gradients
        return [self._text + moment for moment in (teacher, *self.trained_pass(tangent=True, first=True))]

    def stored(self, tangent: bool, first: bool) -> list[float]:
        """sCM (with its tangent) or regression on the states of trajectories: no teacher, and one pass."""
        return self.trained_pass(tangent, first)

    def drawing(self, pictures: int) -> list[float]:
        """The teacher with and without so many prompts, before there is anything else."""
        share = pictures / self.pictures
        teacher = share * (self._text + 2 * self.per.no_grad * self._cells)
        return [teacher - self.copies - self.first_gradients]

    def adversarial(self, first: bool) -> list[float]:
        """The student, the teacher to its last tap, and the heads, which see real and generated pictures."""
        per, taps = self.per, len(self.taps)
        block = FP32 if self.recomputed else per.frozen_block
        frozen = ((self.taps[-1] + 1) * block + per.frozen_ends) * self._cells
        graph = self._kept + frozen - (self.first_gradients if first else 0)
        freed = self.copies if self.recomputed else 0
        moments = [
            graph + 2 * taps * self._head_forward,
            graph + 2 * (taps * per.head + per.frozen_backward) * self._cells - freed,
        ]
        if self.recomputed:
            gradients = 2 * taps * FP32  # of the features
            of_a_block = per.frozen_block + per.frozen_backward + gradients
            moments += [graph + of_a_block * self._cells - freed, *self.trained_pass(False, first)]
        return [self._text + moment for moment in moments]

    def matching(self, first: bool) -> list[float]:
        """The student, whose graph stays while the teacher looks, with and without prompts."""
        teacher = self._kept + 2 * self.per.no_grad * self._cells - (self.first_gradients if first else 0)
        return [self._text + moment for moment in (teacher, *self.trained_pass(tangent=False, first=first))]

    def fake_score(self, sums: float) -> list[float]:
        """One pass of what this is told to be as deep as, while the student's gradients are still there.

        sums  bytes that the pass keeps of weights with additions
        """
        return [sums + moment for moment in self.trained_pass(tangent=False, first=False)]

    def discriminator(self) -> list[float]:
        """Features of every kind, twice while they are mixed; then the heads, which alone keep anything."""
        per, taps = self.per, len(self.taps)
        return [
            self._text + (2 * taps * self.kinds * FP32) * self._cells,
            self._text + taps * self.kinds * self._head_forward,
            self._text + self.kinds * (taps * per.head + per.frozen_backward) * self._cells - self.copies,
        ]

    @property
    def _cells(self) -> int:
        return self.pictures * self.width * self.tokens

    @property
    def _words(self) -> int:
        return self.pictures * self.width * self.text_tokens

    @property
    def _block(self) -> float:
        return self.per.block * self._cells + self.per.block_text * self._words

    @property
    def _kept(self) -> float:
        """Of a pass of the trained network, until its backward."""
        block = FP32 * self._cells if self.recomputed else self._block
        return self.depth * block + self.per.ends * self._cells + self.per.ends_text * self._words

    @property
    def _head_forward(self) -> float:
        """What one head keeps of one kind of picture, and the features where it saves them in bf16 only."""
        return (self.per.head + (FP32 if self.precision is Precision.bf16 else 0)) * self._cells

    @property
    def _text(self) -> float:
        """Prompts and null prompts, the same projected, and each teacher block's keys and values of the prompts."""
        compute = BF16 if self.precision is Precision.bf16 else FP32
        prompts = 2 * self.pictures * self.text_tokens * self.text_width
        return compute * (prompts + 2 * self._words + 2 * self.teacher_depth * self._words)
