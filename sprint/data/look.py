"""A look at a data set before anything is trained on it: what is there, and what is wrong with it."""

import hashlib
import io
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sprint.base.door import read_bytes
from sprint.base.errors import SprintError
from sprint.base.progress import progress
from sprint.data.batch import Encoded, Prompt
from sprint.data.items import BadSample, Items
from sprint.data.pictures import LARGEST_FILE, header_from
from sprint.data.source import open_items
from sprint.recipe.schema import Data, DataKind

EXAMPLES = 5  # bad samples that are named
REPEATED, SAME = 0.01, 0.1  # shares of repeated pictures, and of one caption, that are worth a word


class Spread(NamedTuple):
    """Of whole numbers: the least, the median, the most."""

    least: int
    median: int
    most: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Spread | None":
        if not numbers:
            return None
        ordered = sorted(numbers)
        return cls(ordered[0], ordered[len(ordered) // 2], ordered[-1])

    def __str__(self) -> str:
        return f"{self.least} to {self.most}, median {self.median}"


class Shown(NamedTuple):
    """picture: uint8 [size, size, 3] as a run sees it"""

    where: str
    picture: np.ndarray
    caption: str


@dataclass
class Facts:
    """What `look` saw; everything counts the samples that were looked at.

    samples          there are; looked_at: of them, evenly over all
    formats          pictures by Pillow's name of their format
    heights, widths  pixels, upright, as stored
    captions         lengths in characters
    small            pictures whose shorter side is below data.size: a run enlarges them
    repeated         pictures that are byte for byte another one's
    same_caption     how often the most frequent caption stands, and that caption
    bad, examples    samples that cannot be used, by reason, and what is wrong with the first
    first            the first pictures
    """

    data: Data
    samples: int
    looked_at: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    heights: Spread | None = None
    widths: Spread | None = None
    captions: Spread | None = None
    small: int = 0
    repeated: int = 0
    same_caption: tuple[int, str] = (0, "")
    bad: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    first: list[Shown] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What is there, a line each."""
        of = "" if self.looked_at == self.samples else f", {self.looked_at:,} of them looked at"
        lines = [f"{self.data.kind.value} {self.data.path}: {self.samples:,} samples{of}"]
        if self.formats:
            counts = ", ".join(f"{count:,} {name}" for name, count in self.formats.most_common())
            lines.append(f"pictures: {counts}; height {self.heights}; width {self.widths} pixels")
        if self.captions:
            lines.append(f"captions: {self.captions} characters")
        return lines

    def problems(self) -> list[str]:
        """What is wrong and what to do, a line each; none where all is well."""
        found, good = [], self.looked_at - self.bad.total()
        if self.bad:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.bad.most_common())
            allowed = "within" if self.bad.total() <= self.data.bad_share * self.looked_at else "more than"
            found.append(
                f"{self.bad.total():,} samples cannot be used ({reasons}), {allowed} data.bad_share = "
                f"{self.data.bad_share}; mend or remove them: {'; '.join(self.examples)}"
            )
        if self.small:
            found.append(
                f"{self.small:,} of {good:,} pictures are smaller than data.size = {self.data.size} and would be "
                "enlarged; take larger ones, or a smaller data.size"
            )
        if self.repeated > REPEATED * good:
            found.append(
                f"{self.repeated:,} of {good:,} pictures are there more than once; remove the copies"
            )
        count, caption = self.same_caption
        if count > max(1, SAME * good):
            found.append(
                f"{count:,} of {good:,} captions are the same: {caption[:80]!r}; say what sets them apart"
            )
        return found


def look(data: Data, most: int = 1000, first: int = 16, seconds: float = 60.0) -> Facts:
    """Look at `most` samples, evenly over all, for so many seconds at most; a bar shows how far it is.

    first   how many pictures to keep

    Raises SprintError for a source that cannot be opened. Bad samples are counted and stop nothing.
    """
    if data.kind is DataKind.scenes:
        raise SprintError("data.kind = scenes: they are drawn, and there is nothing to look at")
    items = open_items(data)
    facts = Facts(data, len(items))
    seen = _Seen()
    deadline = time.monotonic() + seconds
    with progress("look", min(most, len(items))) as bar:
        for index in _spread(len(items), most):
            _look_at(items, index, facts, seen, first)
            facts.looked_at += 1
            bar.update()
            if time.monotonic() > deadline:
                break
    facts.heights, facts.widths = Spread.of(seen.heights), Spread.of(seen.widths)
    facts.captions = Spread.of(seen.lengths)
    if seen.captions:
        caption, count = seen.captions.most_common(1)[0]
        facts.same_caption = count, caption
    return facts


@dataclass
class _Seen:
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    captions: Counter[str] = field(default_factory=Counter)
    hashes: set[bytes] = field(default_factory=set)


def _spread(total: int, most: int) -> Iterator[int]:
    count = min(total, most)
    return (k * total // count for k in range(count))


def _look_at(items: Items, index: int, facts: Facts, seen: _Seen, first: int) -> None:
    try:
        sample = items.item(index, np.random.default_rng([facts.data.seed, index]))
        if isinstance(sample, Encoded):
            return
        if not isinstance(sample, Prompt):
            _look_at_picture(items, index, facts, seen)
    except BadSample as bad:
        facts.bad[bad.reason] += 1
        if len(facts.examples) < EXAMPLES:
            facts.examples.append(str(bad))
        return
    seen.lengths.append(len(sample.caption))
    seen.captions[sample.caption] += 1
    if not isinstance(sample, Prompt) and len(facts.first) < first:
        facts.first.append(Shown(items.where(index), sample.picture, sample.caption))


def _look_at_picture(items: Items, index: int, facts: Facts, seen: _Seen) -> None:
    file = items.picture(index)
    try:
        content = read_bytes(file, LARGEST_FILE) if isinstance(file, str) else file.read()
    except SprintError as error:  # it went meanwhile
        raise BadSample("unreadable picture", items.where(index), str(error)) from error
    form, (height, width) = header_from(io.BytesIO(content), items.where(index))
    digest = hashlib.sha256(content).digest()
    facts.repeated += digest in seen.hashes
    seen.hashes.add(digest)
    facts.formats[form] += 1
    facts.small += min(height, width) < facts.data.size
    seen.heights.append(height)
    seen.widths.append(width)
