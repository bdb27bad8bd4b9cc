"""Captions without pictures: a text file with one on each line, or a .jsonl file of {"prompt": "…"} lines."""

import json
from array import array
from pathlib import Path

import numpy as np

from sprint.base.errors import SprintError
from sprint.data.batch import Prompt
from sprint.data.captions import LONGEST, checked
from sprint.data.items import BadSample, Items, said
from sprint.data.tar.entries import File
from sprint.recipe.schema import Data

BOM = "\ufeff".encode()
LONGEST_LINE = 8 * LONGEST  # bytes; JSON may write a character as six


class PromptItems(Items):
    """One prompt a line, in UTF-8; blank lines are passed over.

    A prompt's position is its own place among them, in every epoch: what the teacher draws for it on the fly is
    what it drew ahead. Construction reads the file once and keeps where its lines begin.
    Raises `SprintError` for a file that is missing, unreadable or blank.
    """

    def __init__(self, data: Data):
        self._path = Path(data.path)
        self._json = self._path.suffix.lower() == ".jsonl"
        self._starts, self._sizes, self._numbers = array("q"), array("q"), array("q")  # bytes; lines from 1
        try:
            with open(self._path, "rb") as stream:
                self._find_lines(stream)
            self._file = File(self._path)
        except OSError as error:
            raise SprintError(f"{self._path}: {said(error)}; set data.path to a file of prompts") from error
        if not self._starts:
            raise SprintError(f"{self._path}: no prompts there; write one on each line")

    def _find_lines(self, stream) -> None:
        start = 0
        for number, line in enumerate(stream, 1):
            if line.removeprefix(BOM).strip():
                self._starts.append(start)
                self._sizes.append(len(line))
                self._numbers.append(number)
            start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def item(self, index: int, draw: np.random.Generator) -> Prompt:
        where, line = self.where(index), self._line(index).removeprefix(BOM)
        prompt = _prompt_of_json(line, where) if self._json else _text(line, where)
        return Prompt(checked(prompt, where), index)

    def where(self, index: int) -> str:
        return f"{self._path}, line {self._numbers[index]}"

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


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise BadSample("unreadable caption", where, said(error)) from error


def _prompt_of_json(line: bytes, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadSample("unreadable caption", where, said(error)) from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise BadSample("missing caption", where, 'expected {"prompt": "…"}')
    return value["prompt"]
