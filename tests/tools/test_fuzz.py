"""The fuzzer: what it counts as bad is noticed, its mutations are the seed's, and a minute of it finds nothing."""

import random

import pytest

from tools.fuzz import run as fuzz_run
from tools.fuzz.__main__ import chosen, fuzz
from tools.fuzz.mutate import BYTES, JSON, LEGACY, SAFETENSORS, TEXT, TORCH, mutated
from tools.fuzz.run import BAD, HANG, LEFT, MEMORY, OPENED, RAN, REFUSED, TRACEBACK, run
from tools.fuzz.targets import TARGETS, safetensors_file, torch_file

A_WHILE = 25  # seconds


def refuse(argv):
    raise SystemExit(2)


def hang(argv):
    while True:
        pass


def take(argv):
    bytearray(b"x") * 2**29


def leave(argv):
    open("left", "w").close()
    raise SystemExit(2)


def execute(argv):
    open("RAN", "w").close()


@pytest.mark.parametrize(
    ("main", "kind"),
    [
        (lambda argv: None, OPENED),
        (refuse, REFUSED),
        (lambda argv: 1 / 0, TRACEBACK),
        (hang, HANG),
        (take, MEMORY),
        (leave, LEFT),
        (execute, RAN),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_outcome_is_told(main, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_run.sprint.cli.main, "main", main)
    monkeypatch.setattr(fuzz_run, "SECONDS", 0.5 if kind == HANG else 20.0)
    monkeypatch.setattr(fuzz_run, "BYTES", 2**26)
    (tmp_path / "case").mkdir()
    assert run([], tmp_path / "case", tmp_path / "said").kind == kind


@pytest.mark.parametrize("mutations", [BYTES, JSON, TEXT, SAFETENSORS, TORCH, LEGACY])
def test_the_same_seed_mutates_the_same_way(mutations, tmp_path):
    make, name = (safetensors_file, "x.safetensors") if mutations is SAFETENSORS else (torch_file, "x.pth")
    make(tmp_path)
    content = b'{"a": [1, 2.5, "x"]}\n' if mutations in (JSON, TEXT) else (tmp_path / name).read_bytes()
    made = [mutated(random.Random(seed), content, mutations) for seed in range(300)]
    assert made == [mutated(random.Random(seed), content, mutations) for seed in range(300)]
    assert len(set(made)) > 100


def test_every_kind_can_be_chosen_by_its_name():
    assert chosen(["recipe"]) and chosen(None) == list(range(len(TARGETS)))
    assert all(number in chosen([target.name]) for number, target in enumerate(TARGETS))


@pytest.mark.slow
def test_a_while_of_mutations_ends_well():
    """Other cases than the tool's own half hour: seeds from a million."""
    found = fuzz(chosen(None), count=400, seconds=A_WHILE, seed=1_000_000, jobs=1, keep=None)
    bad = [(TARGETS[each.case.target].name, each.case.seed, each.outcome) for each in found]
    assert len(found) >= len(TARGETS)
    assert not [each for each in bad if each[-1].kind in BAD]
