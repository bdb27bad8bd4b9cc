"""Captions without pictures: a text file with one on each line, or a .jsonl file of {"prompt": "…"} lines."""

import json
import mmap
from array import array
from pathlib import Path

import numpy as np

from sprint.data.batch import Prompt
from sprint.data.items import BadSample, Items, said
from sprint.errors import SprintError
from sprint.recipe import Data

BOM, NEWLINE = "\ufeff".encode(), b"\n"


class PromptItems(Items):
    """One prompt a line, in UTF-8; blank lines are passed over.

    A prompt's position is its own place among them, in every epoch: what the teacher draws for it on the fly is
    what it drew ahead. Construction reads the file once and keeps where its lines begin.
    Raises `SprintError` for a file that is missing, unreadable or blank.
    """

    def __init__(self, data: Data):
        self._file = Path(data.path)
        self._json = self._file.suffix.lower() == ".jsonl"
        self._starts, self._numbers = array("q"), array("q")  # of lines: first byte, number from 1
        try:
            with open(self._file, "rb") as stream:
                self._find_lines(stream)
                if self._starts:
                    self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise SprintError(f"{self._file}: {said(error)}; set data.path to a file of prompts") from error
        if not self._starts:
            raise SprintError(f"{self._file}: no prompts there; write one on each line")

    def _find_lines(self, stream) -> None:
        start = 0
        for number, line in enumerate(stream, 1):
            if line.removeprefix(BOM).strip():
                self._starts.append(start)
                self._numbers.append(number)
            start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def item(self, index: int, draw: np.random.Generator) -> Prompt:
        start = self._starts[index]
        end = self._bytes.find(NEWLINE, start)
        line = self._bytes[start : end if end >= 0 else len(self._bytes)].removeprefix(BOM)
        where = f"{self._file}, line {self._numbers[index]}"
        prompt = _prompt_of_json(line, where) if self._json else _text(line, where)
        if not prompt.strip():
            raise BadSample("empty caption", where)
        return Prompt(prompt.strip(), index)


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
