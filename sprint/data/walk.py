"""What a folder holds, at any depth, and what to say of it where that is not what was wanted."""

import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NoReturn

from sprint.base.door import shown
from sprint.base.errors import SprintError
from sprint.data.pictures import SUFFIXES
from sprint.recipe.kinds import kind_of
from sprint.recipe.schema import Data

# Folders of thumbnails, deleted files and twins that other programs leave beside one's own.
NOT_OURS = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
COUNTED = 10_000  # files that a message looks at
SINGLE = {
    ".zip": "unzip it, and give that folder",
    **dict.fromkeys((".parquet", ".arrow"), "give the folder that it lies in, with data.kind=huggingface"),
    **dict.fromkeys(SUFFIXES, "give the folder that it lies in"),
}
NAMED = 5  # suffixes that it names


def files_in(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(a folder, the sorted names of what in it is no folder), from `folder` downwards, in a fixed order.

    Hidden files and folders are passed over, and `NOT_OURS`.
    A link to a folder is followed, after all that is there without links;
    no folder comes twice, whichever way it is reached. Raises SprintError for one that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        links: list[str] = []
        for start in waiting:
            for root, folders, names in os.walk(start, onerror=_refuse):
                status = os.stat(root)
                if (status.st_dev, status.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                there = sorted(name for name in folders if not name.startswith(".") and name not in NOT_OURS)
                folders[:] = [name for name in there if not os.path.islink(os.path.join(root, name))]
                links += [os.path.join(root, name) for name in there if name not in folders]
                yield root, sorted(name for name in names if not name.startswith("."))
        waiting = links


def _refuse(error: OSError) -> NoReturn:
    raise SprintError(f"{shown(error.filename)}: cannot be read: {error.strerror}") from error


def nothing_found(data: Data) -> str:
    """What is at data.path instead, and the nearest thing that would work: the end of an error's line."""
    there = what_is_in(Path(data.path)) if os.path.isdir(data.path) else ""
    kind = kind_of(data.path)
    hint = f"; it looks like data.kind={kind.value}" if kind not in (None, data.kind) else ""
    suffix = os.path.splitext(data.path)[1].lower()
    if os.path.isfile(data.path) and suffix in SINGLE:
        hint = f"; {SINGLE[suffix]}"
    return (f"; there {there}" if there else "") + hint


def what_is_in(folder: Path) -> str:
    """ "are 12 .heic, 12 .txt" or "is nothing" """
    names = islice((name for _, names in files_in(folder) for name in names), COUNTED)
    counts = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in names)
    if not counts:
        return "is nothing"
    most = [f"{count:,} {shown(suffix, 20)}" for suffix, count in counts.most_common(NAMED)]
    return f"are {', '.join(most)}" + (" and others" if len(counts) > NAMED else "")
