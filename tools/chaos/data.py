"""Pictures from strangers: damaged, hostile, enormous, without captions; in shards and in a folder.

Imported by chaos.py; not a program.
"""

import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tools.chaos.lab import Lab, Outcome, last_line

GOOD = 40
BATCH = 8  # samples a step; stage 1 is long enough to meet every sample of an epoch


def poisoned_data(lab: Lab, outcome: Outcome) -> None:
    """The run goes on, counts what was planted and writes nowhere else; past data.bad_share it stops."""
    for kind, plant in (("webdataset", plant_shard), ("folder", plant_folder)):
        data = lab.folder / f"poisoned-{kind}"
        data.mkdir()
        planted, good = plant(data)
        total = planted.total() + good
        outcome.figures[kind] = {"samples": total, "bad": dict(planted)}
        before = {file for file in lab.folder.rglob("*") if not runs_own(file)}
        steps = -(-total // BATCH)
        settings = (f"data.kind={kind}", f"data.path={data}", f"adapt.steps={steps}", "distill.steps=2")
        command = lab.command(extra=(*settings, "data.bad_share=0.4"))
        life = lab.live(command)
        codes = life.codes()
        outcome.did(f"{kind}: {planted.total()} of {total} samples are bad; ended with {codes[0]}")
        outcome.require(not any(codes), f"the run fails: {last_line(life.said())}")
        found = Counter(entry["reason"] for entry in listed(command.run))
        outcome.require(found == planted, f"listed {dict(found)}, but planted {dict(planted)}")
        after = {file for file in lab.folder.rglob("*") if not runs_own(file)}
        strange = sorted(str(file) for file in after - before if file.parent != data or file.suffix != ".npz")
        outcome.require(not strange, f"written outside of the run: {strange[:3]}")
        strict = lab.live(lab.command(extra=(*settings, "data.bad_share=0.02")))
        codes, said = strict.codes(), last_line(strict.said())
        outcome.did(f"{kind}, data.bad_share = 0.02: ended with {codes[0]}: {said}")
        outcome.require(codes == [2] and "data.bad_share" in said, f"not stopped: {said}")


def runs_own(file: Path) -> bool:
    """Inside of a run's folder, or what it said."""
    return "runs" in file.parts or file.name == "runs" or file.name.split(".")[0].isdigit()


def listed(run: Path) -> list[dict]:
    file = run / "bad_samples.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- what is planted ----------------------------------------------------------------------------------


def picture(number: int) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60000×60000 pixels: 10 GB once decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(2**16))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def samples() -> Iterator[tuple[str, bytes | None, bytes | None, str]]:
    """Name, picture, caption and what is wrong with it, of every sample."""
    for number in range(GOOD):
        yield f"good{number:02d}", picture(number), b"a red circle", ""
    for number in range(3):
        whole = picture(number)
        yield f"torn{number}", whole[: len(whole) // (number + 2)], b"torn", "unreadable picture"
    yield "words", b"this is no picture", b"words", "unreadable picture"
    yield "bomb", bomb(), b"a bomb of pixels", "picture too large"
    for number in range(2):
        yield f"silent{number}", picture(number), None, "missing caption"
    yield "blank", picture(0), b"  \n", "empty caption"
    yield "bytes", picture(0), b"\xff\xfe\xfa", "unreadable caption"
    yield "unseen", None, b"a caption and no picture", "missing picture"


def plant_folder(folder: Path) -> tuple[Counter, int]:
    """-> bad samples by reason, and the number of good ones"""
    reasons = Counter()
    for name, image, caption, reason in samples():
        for suffix, content in ((".png", image), (".txt", caption)):
            if content is not None:
                (folder / f"{name}{suffix}").write_bytes(content)
        reasons[reason] += bool(reason)
    return +reasons, GOOD


def plant_shard(folder: Path) -> tuple[Counter, int]:
    """Two shards, of which the second is cut off; entries in the first that would lead out of it.  -> as above"""
    reasons = Counter()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, image, caption, reason in samples():
            for suffix, content in ((".png", image), (".txt", caption)):
                if content is not None:
                    add(tar, f"{name}{suffix}", content)
            reasons[reason] += bool(reason)
        for name in (str(folder.parent / "absolute.png"), "../climbed.png", "a/../../climbed.txt"):
            add(tar, name, picture(0))
            reasons["hostile entry"] += 1
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        reasons["hostile entry"] += 1
    with tarfile.open(folder / "1.tar", "w") as tar:
        add(tar, "late.png", picture(1))
        add(tar, "late.txt", b"in a shard that ends early")
        add(tar, "lost.png", picture(2))
    whole = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[: whole.index(b"lost.png") + tarfile.BLOCKSIZE * 3])
    reasons["damaged shard"] += 1
    return +reasons, GOOD + 1


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
