"""Captions without pictures: a text file with one on each line, JSON lines, or a table of them."""

import logging
import re
from array import array
from itertools import islice
from pathlib import Path

import numpy as np

from sprint.base.door import check_text, decode, parse_json, regular_file, shown
from sprint.base.errors import SprintError
from sprint.data.batch import Prompt
from sprint.data.captions import FIELDS, LONGEST, checked
from sprint.data.items import BadSample, Items, said
from sprint.data.tables import LINES, TABLES, prompt_of, prompts_of
from sprint.data.tar.entries import File
from sprint.data.walk import nothing_found
from sprint.recipe.schema import Data

log = logging.getLogger(__name__)
BOM = "\ufeff".encode()
LONGEST_LINE = 8 * LONGEST  # bytes; JSON may write a character as six


class PromptItems(Items):
    """One prompt a line, in UTF-8; blank lines are passed over.

    .jsonl       lines {"prompt": "…"}, or another of `captions.FIELDS`, or "…"; so are those of any other file whose
                 first line is such an object
    .csv, .tsv, .json   a table (`sprint.data.tables`), read at once

    A prompt's position is its own place among them, in every epoch: what the teacher draws for it on the fly is
    what it drew ahead. Construction reads the file once and keeps where its lines begin.
    Raises `SprintError` for a file that is missing, unreadable, blank or no text.
    """

    def __init__(self, data: Data):
        self._path, suffix = Path(data.path), Path(data.path).suffix.lower()
        self._starts, self._sizes, self._numbers = array("q"), array("q"), array("q")  # bytes; lines from 1
        self._table: list[str] = []
        try:
            regular_file(self._path)
        except SprintError as error:
            raise SprintError(f"{error}; set data.path to a file of prompts{nothing_found(data)}") from error
        try:
            if suffix in TABLES and suffix not in LINES:
                self._table = prompts_of(self._path)
            else:
                self._open_lines()
        except OSError as error:
            raise SprintError(f"{self._path}: {said(error)}; set data.path to a file of prompts") from error
        if not len(self):
            raise SprintError(f"{self._path}: no prompts there; write one on each line")
        self._json = suffix in LINES or (not self._table and self._first_is_object())

    def _open_lines(self) -> None:
        with open(self._path, "rb") as stream:
            start = stream.read(4096)
            check_text(start, self._path)
            if b"\r" in start and b"\n" not in start:
                raise SprintError(
                    f"{self._path}: its lines end with CR alone; write LF (tr '\\r' '\\n' < OLD > NEW)"
                )
            self._look_at(start.removeprefix(BOM).partition(b"\n")[0].decode(errors="replace"))
            stream.seek(0)
            self._find_lines(stream)
        self._file = File(self._path)

    def _look_at(self, first: str) -> None:
        """Tell of a first line that is no prompt by the looks of it. It is one all the same."""
        columns = {name.strip().strip('"').lower() for name in re.split(r"[,;\t]", first)}
        if columns & {*FIELDS} and all(re.fullmatch(r"[\w ]{1,20}", name) for name in columns):
            log.warning(
                "%s: its first line, %s, is taken for a prompt; if it is the header of a table, name the file .csv",
                self._path,
                shown(first, 40),
            )
        elif first.startswith("#"):
            log.warning("%s: lines that begin with # are prompts too; remove comments", self._path)

    def _find_lines(self, stream) -> None:
        start = 0
        for number, line in enumerate(stream, 1):
            if line.removeprefix(BOM).strip():
                self._starts.append(start)
                self._sizes.append(len(line))
                self._numbers.append(number)
            start += len(line)

    def _first_is_object(self) -> bool:
        try:
            return isinstance(parse_json(self._line(0).removeprefix(BOM), ""), dict)
        except (SprintError, BadSample):
            return False

    def __len__(self) -> int:
        return len(self._table) or len(self._starts)

    def item(self, index: int, draw: np.random.Generator | None = None) -> Prompt:
        where = self.where(index)
        return Prompt(checked(self._prompt(index, where), where), index)

    def where(self, index: int) -> str:
        if self._table:
            return f"{self._path}, row {index + 1}"
        return f"{self._path}, line {self._numbers[index]}"

    def _prompt(self, index: int, where: str) -> str:
        if self._table:
            return self._table[index]
        try:
            line = decode(self._line(index), "it")
            row = parse_json(line, "it") if self._json else line
        except SprintError as error:
            raise BadSample("unreadable caption", where, str(error)) from error
        try:
            return prompt_of(row, "it")
        except SprintError as error:
            raise BadSample("missing caption", where, str(error).removeprefix("it: ")) from error

    def _line(self, index: int) -> bytes:
        size = self._sizes[index]
        if size > LONGEST_LINE:
            raise BadSample(
                "unreadable caption", self.where(index), f"{size} bytes, of at most {LONGEST_LINE}"
            )
        try:
            line = self._file.read(self._starts[index], size)
        except OSError as error:
            raise BadSample("unreadable caption", self.where(index), said(error)) from error
        if len(line) < size:
            raise BadSample("unreadable caption", self.where(index), "the file is shorter than it was")
        return line


def read_prompts(file: Path, count: int | None = None) -> tuple[list[str], int]:
    """-> the first `count` prompts of a file (None: all), and how many there are. Raises SprintError that names the
    line that holds none."""
    items = PromptItems(Data(path=str(file)))
    try:
        return [items.item(k).caption for k in islice(range(len(items)), count)], len(items)
    except BadSample as bad:
        raise SprintError(f"{bad}; mend it or remove it") from bad
