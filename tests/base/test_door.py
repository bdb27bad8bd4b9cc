"""What comes through the door, and what it says of what does not."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from sprint.base.door import (
    at_home,
    check_no_address,
    decode,
    parse_json,
    read_as,
    read_bytes,
    read_json,
    read_text,
    shown,
)
from sprint.base.errors import SprintError


@dataclass
class Sizes:
    heads: Annotated[int, Field(gt=0, le=1024)]
    eps: float = 1e-6


def test_a_regular_file_comes_in(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"heads": 2}')
    assert read_json(tmp_path / "a.json") == {"heads": 2}
    assert read_as(Sizes, tmp_path / "a.json") == Sizes(2)


def test_pipes_devices_folders_and_names_that_no_file_has_do_not(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, why in (
        ("pipe", "a pipe"),
        ("zero", "a device"),
        ("", "a folder"),
        ("none", "No such file"),
        ("\0", "null"),
    ):
        with pytest.raises(SprintError, match=why):
            read_bytes(tmp_path / name, 10)


def test_a_file_larger_than_its_reader_expects_is_not_read(tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 11)
    with pytest.raises(SprintError, match="at most 10"):
        read_bytes(tmp_path / "big", 10)
    assert len(read_bytes(tmp_path / "big", 11)) == 11


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 5000, b"1" + b"0" * 5000, b"{", b"", b"\0", b"{} {}"],
    ids=["deep", "deep object", "digits", "cut", "empty", "zero", "two"],
)
def test_json_that_no_person_wrote_is_one_line(content):
    with pytest.raises(SprintError, match=r"^x\.json is not valid JSON: [^\n]*$"):
        parse_json(content, "x.json")


def test_text_in_another_encoding_is_named_for_what_it_is(tmp_path):
    for encoding in ("utf-16", "utf-16-le"):
        (tmp_path / "p").write_text("a red cat\n", encoding=encoding)
        with pytest.raises(SprintError, match=r"UTF-16.*iconv"):
            read_text(tmp_path / "p")
    with pytest.raises(SprintError, match=r"UTF-32.*iconv -f UTF-32"):
        decode("a red cat".encode("utf-32"), "p")
    with pytest.raises(SprintError, match=r"not UTF-8 text \(byte 3\)"):
        decode("caf\xe9".encode("latin-1"), "p")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"heads": 0}', "heads: Input should be greater than 0 .it is 0."),
        ('{"heads": "x"}', "heads: .*integer"),
        ("{}", "heads: Field required"),
        ('{"heads": 2, "eps": []}', "eps: .*number"),
        ("[]", "valid dictionary|dictionary or an instance"),
    ],
)
def test_a_schema_names_the_field(tmp_path, content, says):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(SprintError, match=says):
        read_as(Sizes, tmp_path / "c.json")


def test_what_is_shown_is_one_short_line():
    assert shown("a\n# b\x1b[31m") == "a # b [31m"
    assert len(shown("x" * 10_000)) == 121


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("https://huggingface.co/OWNER/NAME", "give its hub id alone: OWNER/NAME"),
        ("https://huggingface.co/datasets/OWNER/NAME/tree/main", "give its hub id alone: OWNER/NAME"),
        ("hf://OWNER/NAME", "give its hub id alone: OWNER/NAME"),
        ("file:///data/x.pth", "give the path alone: /data/x.pth"),
        ("s3://bucket/x-{0..3}.tar", "download it"),
        ("https://x.org/model.safetensors", "download it"),
    ],
)
def test_an_address_is_no_path(name, way):
    with pytest.raises(SprintError, match=re.escape(way)):
        check_no_address(name)


@pytest.mark.parametrize("name", ["OWNER/NAME", "a:b", "C:/x", "/a//b", "x-{0..3}.tar"])
def test_what_is_no_address(name):
    check_no_address(name)


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home("~/a") == tmp_path / "a" and at_home("a~") == Path("a~")
    for name in ("~nobody-of-that-name/x", "a\0b"):
        with pytest.raises(SprintError):
            at_home(name)
