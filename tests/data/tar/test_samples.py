"""Samples of tar shards: what is found where, hostile and broken shards, the index that is remembered."""

import io
import json
import os
import shutil
import tarfile
import threading
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from sprint.base.errors import SprintError
from sprint.data.items import BadSample
from sprint.data.tar import index as tar_index
from sprint.data.tar import samples as tar
from sprint.data.tar.entries import LONGEST_NAME
from sprint.data.tar.index import SCANNERS, TarIndex, key_and_suffix
from sprint.data.tar.samples import TarSamples, expand_braces

BLOCK = tarfile.BLOCKSIZE


def plain(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    """An entry as `tarfile` takes it; `fields` of its header replace what is usual."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry, content


def write_tar(file: Path, entries, format: int = tarfile.USTAR_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=format) as archive:
        for entry, content in entries:
            archive.addfile(entry, io.BytesIO(content))
    return file


def raw(entry: tarfile.TarInfo, content: bytes = b"", format: int = tarfile.GNU_FORMAT) -> bytes:
    """Header, content and padding, which need not agree."""
    return entry.tobuf(format) + content + bytes(-len(content) % BLOCK)


def pax(records: bytes) -> bytes:
    """A header about the next entry."""
    return raw(*plain("pax", records, type=tarfile.XHDTYPE))


def record(key: str, value: str) -> bytes:
    """A record of such a header; its first word is the length of the whole."""
    rest = f" {key}={value}\n".encode()
    length = next(n for n in range(len(rest), len(rest) + 20) if len(str(n)) + len(rest) == n)
    return str(length).encode() + rest


def everything(samples: TarSamples) -> dict[str, dict[str, bytes]]:
    return {samples.where(k): samples.read(k, samples.suffixes(k)) for k in range(len(samples))}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Two shards of three samples each; the KEYs are the same in both."""
    for shard in range(2):
        entries = [
            plain(f"{k}.{s}", f"{shard}{k}{s}".encode() * 9) for k in range(3) for s in ("json", "JPG")
        ]
        write_tar(tmp_path / "shards" / f"s-{shard:03d}.tar", entries)
    return tmp_path / "shards"


# Samples


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", "jpg")),
        ("x/a.seg.PNG", ("x/a", "seg.png")),
        ("./a.jpg", ("a", "jpg")),
        ("x.y/a.jpg", ("x.y/a", "jpg")),
        ("README", None),
        ("x/.hidden", None),
        ("x/._a.jpg", None),
        ("a.", None),
    ],
)
def test_key_ends_at_the_first_dot_of_the_base_name(name, parts):
    assert key_and_suffix(name) == parts


def test_samples_are_what_tarfile_reads(folder):
    samples = TarSamples(folder)
    found = everything(samples)
    assert list(found) == [f"s-00{shard}.tar: {k}" for shard in range(2) for k in range(3)]
    assert found["s-001.tar: 2"] == {"json": b"12json" * 9, "jpg": b"12JPG" * 9}
    assert samples.read(4, ("jpg", "txt")) == {"jpg": b"11JPG" * 9}
    assert samples.read(4, ("jpg",), most=3) == {"jpg": b"11J"}
    assert samples.shard(4) == folder / "s-001.tar" and samples.key(4) == "1" and samples.skipped == []


def test_members_need_not_stand_together(tmp_path):
    entries = [plain("a.txt", b"1"), plain("b.txt", b"2"), plain("a.jpg", b"3"), plain("b.jpg", b"4")]
    samples = TarSamples(write_tar(tmp_path / "x.tar", entries))
    assert everything(samples) == {
        "x.tar: a": {"txt": b"1", "jpg": b"3"},
        "x.tar: b": {"txt": b"2", "jpg": b"4"},
    }


def test_having_tells_samples_with_a_suffix(tmp_path):
    entries = [plain("a.txt"), plain("b.jpg"), plain("c.txt"), plain("c.png")]
    samples = TarSamples(write_tar(tmp_path / "x.tar", entries))
    assert samples.having(("jpg", "png")).tolist() == [False, True, True]
    assert samples.having(("webp",)).tolist() == [False, False, False]


def test_a_sample_is_one_read_and_far_members_are_two(tmp_path, monkeypatch):
    far = plain("z.bin", bytes(tar.NEAR))
    near, apart = (
        [plain("a.txt", b"1"), plain("a.jpg", b"2")],
        [plain("b.txt", b"3"), far, plain("b.jpg", b"4")],
    )
    samples = TarSamples(write_tar(tmp_path / "x.tar", near + apart))
    reads = []
    read = tar.File.read
    monkeypatch.setattr(tar.File, "read", lambda *args: reads.append(args[2]) or read(*args))
    assert samples.read(0, ("txt", "jpg")) == {"txt": b"1", "jpg": b"2"}
    assert reads == [2 * BLOCK + 1]
    assert samples.read(1, ("txt", "jpg")) == {"txt": b"3", "jpg": b"4"}
    assert reads[1:] == [1, 1]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    name = "d/" + "é" * 150
    samples = TarSamples(write_tar(tmp_path / "x.tar", [plain(f"{name}.txt", b"1"), plain("b.txt")], format))
    assert [samples.key(k) for k in range(2)] == [name, "b"]
    assert samples.read(0, ("txt",)) == {"txt": b"1"}


def test_many_threads_read_more_shards_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "OPEN_FILES", 2)
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", [plain("a.txt", b"%d" % shard * 5000)])
    samples, wrong = TarSamples(tmp_path), []

    def work(seed):
        for shard in np.random.default_rng(seed).integers(8, size=400).tolist():
            if samples.read(shard, ("txt",)) != {"txt": b"%d" % shard * 5000}:
                wrong.append(shard)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len([f for f in os.listdir("/proc/self/fd") if _leads_to(f, tmp_path)]) <= 2


def _leads_to(descriptor: str, folder: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(folder))
    except OSError:
        return False


# Which shards


def test_folder_shard_and_pattern_name_shards(folder, tmp_path, monkeypatch):
    write_tar(folder / "deep" / "er" / "a.tar", [plain("k.txt")])
    write_tar(folder / ".hidden.tar", [plain("k.txt")])
    assert len(TarSamples(folder)) == 7
    assert TarSamples(folder).where(0) == "deep/er/a.tar: k"
    assert len(TarSamples(folder / "s-001.tar")) == 3
    assert len(TarSamples(f"{folder}/s-{{000..001}}.tar")) == 6
    monkeypatch.chdir(tmp_path)
    assert TarSamples("shards/{s-001,deep/er/a}.tar").where(3) == "deep/er/a.tar: k"
    monkeypatch.chdir(folder)
    assert TarSamples("s-001.tar").where(0) == "s-001.tar: 0"


def test_braces_expand_in_order():
    assert expand_braces("x{8..10}{a,b}") == ["x8a", "x8b", "x9a", "x9b", "x10a", "x10b"]
    assert expand_braces("{000..002}.tar") == ["000.tar", "001.tar", "002.tar"]
    assert expand_braces("{}{a}") == ["{}{a}"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere: no such shard"),
        ("{000..002}.tar", "002.tar: no such shard"),
        ("{5..1}.tar", r"\{5..1\} is no range of shards"),
        ("{0..9999999}.tar", "would be more than 1,000,000 shards"),
        ("empty", "no .tar shards in this folder"),
        ("packed", "one.tar.gz: compressed; unpack it"),
        ("packed.tar", "packed.tar: compressed; unpack it"),
        ("noise.tar", "no samples in 1 shards; noise.tar: byte 0: no tar header"),
        ("nameless.tar", "no samples in 1 shards; expected entries KEY.suffix"),
    ],
)
def test_refusals_name_what_is_wrong(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("000", "001"):
        write_tar(tmp_path / f"{name}.tar", [plain("a.txt")])
    Path("empty").mkdir()
    Path("packed").mkdir()
    for file in ("packed/one.tar.gz", "packed.tar"):
        tarfile.open(file, "w:gz").close()
    Path("noise.tar").write_bytes(b"noise" * 1000)
    write_tar(tmp_path / "nameless.tar", [plain("README", b"x")])
    with pytest.raises(SprintError, match=message):
        TarSamples(path)


# Hostile and broken shards


HOSTILE = {
    "absolute": raw(*plain("/etc/passwd.txt", b"x")),
    "parent": raw(*plain("a/../../b.txt", b"x")),
    "control": raw(*plain("a\x1b[31m.txt", b"x")),
    "no UTF-8": raw(*plain("a\udcff.txt", b"x")),
    "long": raw(*plain("n" * (LONGEST_NAME + 1) + ".txt", b"x")),
    "symbolic link": raw(*plain("l.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "link with a size": raw(*plain("l.txt", type=tarfile.LNKTYPE, linkname="good.txt", size=10**6)),
    "device": raw(*plain("d.txt", type=tarfile.CHRTYPE)),
    "pipe": raw(*plain("p.txt", type=tarfile.FIFOTYPE)),
    "unknown type": raw(*plain("u.txt", b"x" * 600, type=b"Q")),
    "pax: absolute": pax(record("path", "/etc/passwd.txt")) + raw(*plain("x.txt", b"x")),
    "pax: lies about its length": pax(b"999 path=x.txt\n") + raw(*plain("x.txt", b"x")),
    "pax: no number": pax(b"path=x.txt\n") + raw(*plain("x.txt", b"x")),
    "pax: length 0": pax(b"0 a=b\n") + raw(*plain("x.txt", b"x")),
    "pax: negative length": pax(b"-5 a=b\n") + raw(*plain("x.txt", b"x")),
    "pax: size of words": pax(record("size", "abcd")) + raw(*plain("x.txt", b"x")),
    "pax: sparse": pax(record("GNU.sparse.major", "1")) + raw(*plain("x.txt", b"x")),
    "pax: too long": pax(record("comment", "x" * 2**20)) + raw(*plain("x.txt", b"x")),
    "twice": raw(*plain("good.txt", b"other")),
}


DETAILS = {
    "pax: absolute": "a path that leads out of the shard",
    "pax: size of words": "a damaged pax header",
    "pax: sparse": "a sparse file",
    "sparse": "a sparse file",
    "no UTF-8": "a name with control characters, or no UTF-8",
    "device": "a link, a device or of an unknown type",
}


def sparse() -> bytes:
    """An entry in GNU's old format, with two more blocks of its map before the data."""
    block = bytearray(tarfile.TarInfo("sparse.txt").tobuf(tarfile.GNU_FORMAT))
    block[156:157], block[482] = tarfile.GNUTYPE_SPARSE, 1
    block[124:136] = b"%011o\0" % 700
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    more, last = bytearray(BLOCK), bytearray(BLOCK)
    more[504] = 1
    return bytes(block) + bytes(more) + bytes(last) + b"d" * 700 + bytes(2 * BLOCK - 700)


HOSTILE["sparse"] = sparse()


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_entries_are_passed_over_and_counted(kind, tmp_path):
    content = raw(*plain("good.txt", b"1")) + HOSTILE[kind] + raw(*plain("last.txt", b"2")) + bytes(2 * BLOCK)
    (tmp_path / "x.tar").write_bytes(content)
    samples = TarSamples(tmp_path / "x.tar")
    assert everything(samples) == {"x.tar: good": {"txt": b"1"}, "x.tar: last": {"txt": b"2"}}
    (skipped,) = samples.skipped
    assert skipped.where.startswith("x.tar: byte ") and skipped.where.isprintable()
    assert skipped.reason == ("repeated entry" if kind == "twice" else "hostile entry")
    assert skipped.detail == DETAILS.get(kind, skipped.detail)


BROKEN = {
    "absurd size": raw(*plain("x.txt", size=2**62)),
    "negative size": raw(*plain("x.txt", size=-(2**40))),
    "pax: absurd size": pax(record("size", "9" * 13)) + raw(*plain("x.txt", b"x")),
    "pax: negative size": pax(record("size", "-5")) + raw(*plain("x.txt", b"x")),
    "pax: absurd header": raw(*plain("pax", type=tarfile.XHDTYPE, size=2**50)),
    "noise": b"n" * BLOCK,
    "half a header": b"",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_shard_gives_what_is_before_the_break(kind, tmp_path):
    end = b"n" * 100 if kind == "half a header" else raw(*plain("last.txt", b"2"))
    (tmp_path / "x.tar").write_bytes(raw(*plain("good.txt", b"1")) + BROKEN[kind] + end)
    samples = TarSamples(tmp_path / "x.tar")
    assert everything(samples) == {"x.tar: good": {"txt": b"1"}}
    assert [s.reason for s in samples.skipped] == ["damaged shard"]


def test_a_shard_cut_anywhere_never_crashes(folder):
    shard = folder / "s-000.tar"
    whole, content = everything(TarSamples(shard)), shard.read_bytes()
    for length in [*range(1, 6 * BLOCK, 101), *range(0, 12 * BLOCK + 1, BLOCK)]:
        shard.write_bytes(content[:length] if length else content[: 2 * BLOCK])
        try:
            samples = TarSamples(shard)
        except SprintError as error:
            assert "no samples" in str(error) and length < 2 * BLOCK
            continue
        assert len(samples.skipped) == 1
        for where, members in everything(samples).items():
            assert members.items() <= whole[where].items()


def test_flipped_bytes_never_crash(folder):
    shard, random = folder / "s-000.tar", np.random.default_rng(0)
    content = shard.read_bytes()
    headers = range(0, 12 * BLOCK, 2 * BLOCK)
    for _ in range(300):
        broken = bytearray(content)
        header = int(random.choice(headers))
        for place in random.integers(BLOCK, size=3).tolist():
            broken[header + place] = int(random.integers(256))
        # the sum is made to agree, so that the fields are used
        broken[header + 148 : header + 156] = b" " * 8
        broken[header + 148 : header + 156] = b"%06o\0 " % sum(broken[header : header + BLOCK])
        shard.write_bytes(broken)
        try:
            everything(TarSamples(shard))
        except (SprintError, BadSample) as error:
            assert len(str(error).splitlines()) == 1


def test_a_shard_of_endless_suffixes_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "MOST_SUFFIXES", 3)
    samples = TarSamples(write_tar(tmp_path / "x.tar", [plain(f"a{k}.{k}") for k in range(5)]))
    assert len(samples) == 3 and len(samples.skipped) == 2


def test_what_grew_too_large_or_changed_is_a_bad_sample(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "x.tar", [plain("a.txt", b"1" * 20000)])
    samples = TarSamples(shard)
    monkeypatch.setattr(tar, "LARGEST_MEMBER", 19999)
    with pytest.raises(BadSample, match=r"x\.tar: a: hostile entry: its txt has 20000 bytes"):
        samples.read(0, ("txt",))
    monkeypatch.undo()
    os.truncate(shard, 5000)
    with pytest.raises(BadSample, match="damaged shard: the shard is shorter than it was"):
        samples.read(0, ("txt",))
    shard.unlink()
    with pytest.raises(BadSample, match="damaged shard: No such file"):
        TarSamples.read(_reopened(samples), 0, ("txt",))


def _reopened(samples: TarSamples) -> TarSamples:
    samples._open.cache_clear()
    return samples


# Files beside a shard


def test_sidecars_give_members(tmp_path):
    for name in ("a", "a_b"):
        write_tar(tmp_path / f"{name}.tar", [plain("k.txt", b"1"), plain("é.txt", b"2")])
    texts = {"other": "é", "é": {"long": ["ü", 1]}, "k": "😀 {"}
    (tmp_path / "a_X_Y.json").write_text(json.dumps(texts, ensure_ascii=False, indent=1), encoding="utf-8")
    (tmp_path / "a_b.json").write_text("\ufeff" + json.dumps(texts), encoding="utf-8")
    samples = TarSamples(tmp_path, sidecars=True)
    members = {
        w: {s: json.loads(c) for s, c in m.items() if s != "txt"} for w, m in everything(samples).items()
    }
    assert members == {
        "a.tar: k": {"/_X_Y.json": texts["k"]},
        "a.tar: é": {"/_X_Y.json": texts["é"]},
        "a_b.tar: k": {"/.json": texts["k"]},
        "a_b.tar: é": {"/.json": texts["é"]},
    }
    assert TarSamples(tmp_path).suffixes(0) == ["txt"]


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"k" 1}', '{"k": 1', '{"k": [', "[" * 10**5, '{"k": 1;}', "\udcff"]
)
def test_damaged_sidecars_are_counted(text, tmp_path):
    write_tar(tmp_path / "a.tar", [plain("k.txt")])
    (tmp_path / "a_X.json").write_bytes(text.encode(errors="surrogateescape"))
    assert [s[:2] for s in TarSamples(tmp_path, sidecars=True).skipped] == [
        ("a_X.json", "unreadable caption")
    ]


def test_empty_sidecars_are_none(tmp_path):
    write_tar(tmp_path / "a.tar", [plain("k.txt")])
    (tmp_path / "a_X.json").write_text(" { } ")
    samples = TarSamples(tmp_path, sidecars=True)
    assert samples.suffixes(0) == ["txt"] and not samples.skipped


# The remembered index


@pytest.fixture
def scans(monkeypatch):
    """Names of the shards whose headers were read."""
    names, scan = [], tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda root, group: names.append(group[0]) or scan(root, group))
    return names


def test_headers_are_read_once(folder, scans):
    (folder / "s-000.tar").write_bytes(b"n" * 600)
    first = TarSamples(folder)
    assert sorted(scans) == ["s-000.tar", "s-001.tar"]
    second = TarSamples(folder)
    assert len(scans) == 2
    assert everything(first) == everything(second) and first.skipped == second.skipped != []
    TarSamples(folder / "s-001.tar")
    assert scans[2:] == ["s-001.tar"]


def test_changed_shards_are_read_again(folder, scans):
    TarSamples(folder)
    write_tar(folder / "s-001.tar", [plain("new.txt", b"1")])
    assert TarSamples(folder).key(3) == "new"
    os.utime(folder / "s-000.tar", ns=(1, 1))
    TarSamples(folder)
    (folder / "s-000.tar").rename(folder / "t.tar")
    assert TarSamples(folder).where(1) == "t.tar: 0"
    assert len(scans) == 2 * 4


def test_a_damaged_index_is_made_again(folder, scans):
    TarSamples(folder)
    (index,) = folder.glob(".sprint-*.npz")
    content = index.read_bytes()
    for broken in (b"", content[:-30], content[:200] + bytes([content[200] ^ 1]) + content[201:], b"noise"):
        index.write_bytes(broken)
        assert len(TarSamples(folder)) == 6
    assert len(scans) == 2 * 5
    assert index.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["../s-000.tar", "s-001.tar"]},
        {"files": ["/etc/passwd", "s-001.tar"]},
        {"suffixes": ["json"]},
        {"shard": np.full(6, 2, np.uint32)},
        {"shard": np.zeros(5, np.uint32)},
        {"first": np.arange(7) * 3},
        {"first": np.array([0, 2, 4, 3, 8, 10, 12])},
        {"key_ends": np.arange(7) + 1},
        {"file_number": np.full(12, -1)},
        {"offset": np.full(12, -512)},
        {"offset": np.full(12, 2**63 - 1)},
        {"offset": np.full(12, 2**64 - 512, np.uint64)},
        {"size": np.full(12, 2**62)},
        {"first": np.array([0, 0, 4, 6, 8, 10, 12])},
        {"keys": np.full(6, 0xFF, np.uint8), "key_ends": np.arange(7)},
        {"keys": np.frombuffer("ééé".encode(), np.uint8), "key_ends": np.arange(7)},
        {"size": np.full(12, 0.5)},
        {"size": np.zeros(13, np.int64)},
    ],
)
def test_an_index_that_does_not_agree_with_itself_or_the_shards_is_made_again(change, folder, scans):
    whole = TarSamples(folder)
    (index,) = folder.glob(".sprint-*.npz")
    with np.load(index) as stored:
        fingerprint = stored["fingerprint"].tobytes().decode()
    index.write_bytes(replace(whole._index, **change).to_bytes(fingerprint))
    assert everything(TarSamples(folder)) == everything(whole) and len(scans) == 2 * 2


def test_the_fingerprint_is_that_of_the_headers(folder, scans):
    made = TarSamples(folder).fingerprint
    assert TarSamples(folder).fingerprint == made and len(scans) == 2 and len(made) == 64
    copied = folder.parent / "copy"
    shutil.copytree(folder, copied)
    assert TarSamples(copied).fingerprint == made
    write_tar(copied / "s-001.tar", [plain("0.json", b"longer" * 99)])
    assert TarSamples(copied).fingerprint != made != TarSamples(folder / "s-000.tar").fingerprint


def test_the_index_goes_to_the_users_cache_where_the_folder_is_not_ours(folder, cache, scans, monkeypatch):
    write = tar_index.write_whole

    def refuse(file, content):
        if folder in file.parents:
            raise PermissionError(13, "Permission denied", str(file))
        return write(file, content)

    monkeypatch.setattr(tar_index, "write_whole", refuse)
    assert len(TarSamples(folder)) == len(TarSamples(folder)) == 6
    assert len(scans) == 2 and len(list(cache.rglob("*.npz"))) == 1 and not list(folder.glob(".sprint*"))
    monkeypatch.setattr(tar_index, "write_whole", lambda file, content: refuse(folder / file.name, content))
    (folder / "s-001.tar").unlink()
    assert len(TarSamples(folder)) == 3  # nowhere to remember it


def _count(folder: Path, answers) -> None:
    answers.put(len(TarSamples(folder)))


def test_a_shard_without_samples_leaves_nothing(folder, cache):
    (folder.parent / "empty.tar").write_bytes(b"")
    before = set(folder.parent.iterdir())
    with pytest.raises(SprintError, match="no samples in 1 shards"):
        TarSamples(folder.parent / "empty.tar")
    assert set(folder.parent.iterdir()) == before and not list(cache.rglob("*.npz"))


def test_an_index_packed_to_gigabytes_is_made_again(folder, scans):
    TarSamples(folder)
    (index,) = folder.glob(".sprint-*.npz")
    with np.load(index) as stored:
        arrays = dict(stored)
    np.savez_compressed(index, **arrays | {"offset": np.zeros(2**24, np.int64)})
    assert index.stat().st_size < 2**20 and len(TarSamples(folder)) == 6
    assert len(scans) == 2 * 2


def test_several_processes_may_make_the_index_at_once(folder):
    context = get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_count, args=(folder, answers)) for _ in range(6)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=30) for _ in processes] == [6] * 6
    for process in processes:
        process.join(30)
    assert len(list(folder.iterdir())) == 3


def test_a_million_samples_fit(tmp_path):
    """Bytes of the index for each sample of two members with KEYs of nine digits."""
    write_tar(tmp_path / "x.tar", [plain(f"{k:09d}.{s}") for k in range(1000) for s in ("json", "npy")])
    index = TarSamples(tmp_path)._index
    assert sum(getattr(index, name).nbytes for name in TarIndex.ARRAYS) <= 80 * 1000


def test_shards_are_scanned_side_by_side(tmp_path, monkeypatch):
    for shard in range(SCANNERS):
        write_tar(tmp_path / f"{shard}.tar", [plain("a.txt")])
    together, scan = threading.Barrier(SCANNERS), tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda *args: together.wait(30) is None or scan(*args))
    assert [TarSamples(tmp_path).where(k) for k in range(2)] == ["0.tar: a", "1.tar: a"]
