"""Tables of captions: metadata.jsonl, captions.csv and their like, for pictures in a folder and for prompts alone.

.jsonl         an object a line, or a text a line
.csv, .tsv     a header and rows; which of `DELIMITERS` stands between, the header tells
.json          a list of such objects or of texts; {FILE: text or object}; or COCO's {"images": …, "annotations": …}

The caption stands in one of `captions.FIELDS`, the picture's file, relative to the table, in one of `FILES`.
"""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sprint.base.door import JSON_BYTES, parse_json, read_text, shown
from sprint.base.errors import SprintError
from sprint.data.captions import FIELDS, SCORES, field_of

FILES = ("file_name", "filename", "file", "image", "image_path", "img", "path", "key", "name")
LINES, COLUMNS = (".jsonl", ".ndjson"), (".csv", ".tsv")
DELIMITERS = ",\t;|"
OF_ANY_NAME = (*LINES, *COLUMNS)
TABLES = (*OF_ANY_NAME, ".json")
# of a .json, or of a .txt that is a .csv
NAMES = ("metadata", "captions", "meta_data", "annotations", "meta_cap", "meta_clean", "meta_lat")


def is_table(name: str) -> bool:
    """Whether a file's name says that it may be a table of captions."""
    stem, suffix = os.path.splitext(name.lower())
    named = stem in NAMES or stem.startswith("captions_")
    return suffix in OF_ANY_NAME or (named and suffix in (".json", ".txt"))


def rows_of(file: str | Path) -> Iterator[object]:
    """What the rows are: objects or texts. Raises SprintError."""
    suffix = os.path.splitext(file)[1].lower()
    if suffix == ".json":
        yield from _rows_of_json(parse_json(read_text(file, JSON_BYTES), file), file)
    elif suffix in LINES:
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if line.strip():
                yield parse_json(line, f"{file}, line {number}")
    else:
        yield from _rows_of_columns(read_text(file), file)


def _rows_of_columns(text: str, file: str | Path) -> Iterator[dict]:
    """The delimiter is the one that gives the header most of the names that mean something here, else most names."""
    first = text.partition("\n")[0].rstrip("\r")
    usual = "\t," if str(file).lower().endswith(".tsv") else ","
    headers = {one: [name.strip('" ').lower() for name in first.split(one)] for one in usual + DELIMITERS}
    delimiter = max(headers, key=lambda one: (len({*headers[one]} & {*FIELDS, *FILES}), len(headers[one])))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(lines, [])]
        for line in lines:
            if any(line[len(header) :]):
                raise SprintError(
                    f"{shown(file)}, line {lines.line_num}: {len(line)} columns, the header has {len(header)}; "
                    f"put a text that holds {delimiter!r} in double quotes"
                )
            if line:
                yield dict(zip(header, line, strict=False))
    except csv.Error as error:
        raise SprintError(f"{shown(file)}, line {lines.line_num}: not a table: {error}") from error


def _rows_of_json(value: object, file: str | Path) -> Iterator[object]:
    if isinstance(value, list):
        yield from value
        return
    if not isinstance(value, Mapping):
        raise SprintError(f"{shown(file)}: neither a list nor an object")
    images, annotations = value.get("images"), value.get("annotations")
    if isinstance(images, list) and isinstance(annotations, list):  # COCO's
        names = {one.get("id"): one.get("file_name") for one in images if _has(one, "id")}
        for one in annotations:
            if _has(one, "image_id") and one["image_id"] in names:
                yield one | {"file_name": names[one["image_id"]]}
        return
    for name, one in value.items():
        if isinstance(one, Mapping):
            yield {**one, "file_name": name}
        elif isinstance(one, str | list):
            yield {"file_name": name, "captions": one}


def _has(one: object, key: str) -> bool:
    return isinstance(one, Mapping) and isinstance(one.get(key), str | int)


def captions_by_file(table: str) -> dict[str, object]:
    """What `caption_from` takes, by the file that a row names. Empty for a table that names no files or no captions.

    Several rows of one file are captions to draw from. Raises SprintError for a table that cannot be read.
    """
    found: dict[str, object] = {}
    for row in rows_of(table):
        if not isinstance(row, Mapping):
            continue
        names = {name.lower(): name for name in row if isinstance(name, str)}
        file = next((row[names[field]] for field in FILES if field in names), None)
        field = field_of(row)
        if not isinstance(file, str) or field is None:
            continue
        value = row[field]
        if field == "captions" and SCORES in row:
            found[file] = {field: value, SCORES: row[SCORES]}
        elif file in found and isinstance(value, str):
            before = found[file]
            found[file] = [*before, value] if isinstance(before, list) else [before, value]
        else:
            found[file] = value
    return found


def prompts_of(file: str | Path) -> list[str]:
    """The prompts of a table. Raises SprintError that names the first row without one."""
    prompts = []
    for number, row in enumerate(rows_of(file), 1):
        prompts.append(prompt_of(row, f"{file}, row {number}"))
    return prompts


def prompt_of(row: object, where: str) -> str:
    """A text, or the text in one of `FIELDS`. Raises SprintError."""
    value = row.get(field_of(row)) if isinstance(row, Mapping) else row
    if not isinstance(value, str):
        there = f" among {', '.join(map(shown, list(row)[:6]))}" if isinstance(row, Mapping) else ""
        raise SprintError(f"{shown(where)}: no prompt{there}; expected a text, or one in {', '.join(FIELDS)}")
    return value
