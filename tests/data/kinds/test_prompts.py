"""Files of prompts: lines, blank lines, JSON lines, and what is wrong in them."""

import os

import pytest

from sprint.base.errors import SprintError
from sprint.data.batch import Prompt
from sprint.data.captions import LONGEST
from sprint.data.items import BadSample
from sprint.data.kinds.prompts import LONGEST_LINE, PromptItems, read_prompts
from sprint.data.source import open_source
from sprint.data.tar.entries import File
from sprint.recipe.schema import Data, DataKind


def items_of(tmp_path, content, name="prompts.txt"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return PromptItems(Data(kind=DataKind.prompts, path=str(tmp_path / name)))


def all_of(items):
    return [items.item(k, None) for k in range(len(items))]


@pytest.mark.parametrize(
    "content",
    [
        "one\ntwo\nthrée",
        "one\ntwo\nthrée\n",
        "\ufeff one \r\n\r\n  two\r\n \t\nthrée\r\n\n",
    ],
)
def test_a_prompt_a_line(tmp_path, content):
    assert all_of(items_of(tmp_path, content)) == [Prompt("one", 0), Prompt("two", 1), Prompt("thrée", 2)]


def test_json_lines(tmp_path):
    content = '{"prompt": "one", "id": 7}\n\n{"prompt": "two\\nlines"}'
    assert all_of(items_of(tmp_path, content, "p.JSONL")) == [Prompt("one", 0), Prompt("two\nlines", 1)]


def test_a_prompt_keeps_its_own_position_in_every_epoch(tmp_path):
    items_of(tmp_path, "one\ntwo\nthree")
    source = open_source(Data(kind=DataKind.prompts, path=str(tmp_path / "prompts.txt"), seed=1))
    samples = source.samples(range(30))
    assert set(samples) == {Prompt("one", 0), Prompt("two", 1), Prompt("three", 2)}
    assert all(len(set(samples[3 * e : 3 * e + 3])) == 3 for e in range(10))


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("a.txt", b"caf\xe9", "unreadable caption"),
        ("a.jsonl", b"{", "unreadable caption"),
        ("a.jsonl", b'{"prompt": 3}', "missing caption"),
        ("a.jsonl", b'{"captions": ["x", "y"]}', "missing caption"),
        ("a.jsonl", b'["x"]', "missing caption"),
        ("a.jsonl", b'{"prompt": " "}', "empty caption"),
        ("a.jsonl", b"[" * 100000, "unreadable caption"),
        ("a.jsonl", b'{"prompt": "\\ud800 a"}', "unreadable caption"),
        ("a.jsonl", b'{"prompt": "%s"}' % (b"a" * (LONGEST + 1)), "unreadable caption"),
        ("a.txt", b"a" * (LONGEST + 1), "unreadable caption"),
        ("a.txt", b"a" * (LONGEST_LINE + 1), "unreadable caption"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, line, reason):
    items = items_of(tmp_path, b"\n" + line + b'\n{"prompt": "fine"}\n', name)
    with pytest.raises(BadSample) as caught:
        items.item(0, None)
    assert caught.value.where == f"{tmp_path / name}, line 2" and caught.value.reason == reason
    assert items.item(1, None).position == 1


def test_a_long_prompt_is_read(tmp_path):
    assert len(items_of(tmp_path, "é" * LONGEST + "\n").item(0, None).caption) == LONGEST


def test_a_line_that_is_never_a_prompt_is_not_read(tmp_path, monkeypatch):
    items = items_of(tmp_path, b"a" * (LONGEST_LINE + 1))
    monkeypatch.setattr(File, "read", None)
    with pytest.raises(BadSample, match=r"line 1: unreadable caption: 800001 bytes, of at most 800000$"):
        items.item(0, None)


def test_a_file_that_became_shorter(tmp_path):
    items = items_of(tmp_path, "one\ntwo\n")
    (tmp_path / "prompts.txt").write_bytes(b"one\nt")
    assert items.item(0, None).caption == "one"
    with pytest.raises(BadSample, match=r"line 2: unreadable caption: the file is shorter than it was$"):
        items.item(1, None)


def test_files_without_prompts_are_refused(tmp_path):
    for content in (b"", b"\n \n", "\ufeff\n".encode()):
        with pytest.raises(SprintError, match=r"prompts.txt: no prompts there; write one on each line$"):
            items_of(tmp_path, content)
    for path, problem in ((tmp_path / "none", ": No such file"), (tmp_path, " is a folder")):
        with pytest.raises(SprintError, match=rf"^{path}{problem}.*; set data.path to a file of prompts"):
            PromptItems(Data(path=str(path)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"text": "one"}\n{"text": "two"}'),
        ("p.jsonl", '{"caption": "one"}\r\n"two"\r\n'),
        ("p.ndjson", '\ufeff"one"\n\n"two"\n'),
        ("p.txt", '{"prompt": "one", "tag": "x"}\n{"prompt": "two"}\n'),
        ("p.csv", "id,Prompt\n1,one\n2,two\n"),
        ("p.tsv", "Prompt\tCategory\none\tx\ntwo\ty\n"),
        ("p.json", '["one", "two"]'),
        ("p.json", '{"17": {"prompt": "one"}, "18": {"prompt": "two"}}'),
    ],
)
def test_every_form_of_prompts(tmp_path, name, content):
    assert all_of(items_of(tmp_path, content, name)) == [Prompt("one", 0), Prompt("two", 1)]
    assert read_prompts(tmp_path / name, 1) == (["one"], 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "one\ntwo\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("p.txt", "one\ntwo\n".encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        ("p.jsonl", '{"text": "one"}'.encode("utf-16"), "is UTF-16"),
        ("p.csv", "text\none\n".encode("utf-16"), "is UTF-16"),
        ("p.txt", b"\x89PNG\r\n\x1a\n\0\0\0", "is no text"),
        (
            "p.csv",
            b"id,words\n1,one\n",
            r"row 1: no prompt among id, words; expected a text, or one in captions,",
        ),
        ("p.json", b"{", "is not valid JSON"),
    ],
)
def test_what_holds_no_prompts_is_named_for_what_it_is(tmp_path, name, content, message):
    with pytest.raises(SprintError, match=message):
        items_of(tmp_path, content, name)


def test_a_pipe_is_no_file_of_prompts(tmp_path):
    os.mkfifo(tmp_path / "p")
    with pytest.raises(SprintError, match="is a pipe or a device, not a file"):
        PromptItems(Data(path=str(tmp_path / "p")))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "prompt,seed\na cat,1\n",
            "is taken for a prompt; if it is the header of a table, name the file .csv",
        ),
        ("caption\na cat\n", "is taken for a prompt"),
        ("# mine\na cat\n", "lines that begin with # are prompts too"),
        ("a cat, seen in the text of a sign\n", ""),
    ],
)
def test_a_first_line_that_looks_like_none_is_said(tmp_path, caplog, content, words):
    assert len(items_of(tmp_path, content)) == content.count("\n")
    assert words in caplog.text and bool(words) == bool(caplog.text)


def test_lines_that_end_as_on_old_macs_are_not_one_prompt(tmp_path):
    with pytest.raises(SprintError, match="lines end with CR alone"):
        items_of(tmp_path, "a cat\ra dog\r")
