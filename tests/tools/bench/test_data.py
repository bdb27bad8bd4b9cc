"""tools/bench/data.py on a few samples of 64 pixels: the data it makes, what it counts, and what it concludes."""

import importlib.util
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sprint.base.errors import SprintError
from sprint.data.batch import Batch
from sprint.data.cache.items import verify
from sprint.data.source import open_source
from tools.bench import data as bench_data
from tools.bench import data_cases, measure
from tools.bench.data import (
    Need,
    Pass,
    Verdict,
    judged,
    need_by_flops,
    rates_of,
    verdict,
)
from tools.bench.data_cases import (
    SCENES,
    caption,
    encoded,
    jpegs,
    make_formats,
)

COUNT, SIZE = 5, 64
PICTURES, ENCODED = ("folder", "webdataset", "huggingface"), ("cache", "reference")


@pytest.fixture(autouse=True)
def nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "index"))
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """SHARD of two, so that every kind of shard is cut."""
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
        patch.setattr(data_cases, "SHARD", 2)
        yield make_formats(tmp_path_factory.mktemp("formats"), COUNT, SIZE)


def arguments(**changes) -> SimpleNamespace:
    return SimpleNamespace(
        **{"samples": 4, "batch": 2, "workers": [1, 2], "rounds": 2, "seconds": 0.0} | changes
    )


# ---- made-up data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_there(formats, name):
    source = open_source(formats[name].data)
    samples = source.samples(range(COUNT))
    assert {sample.caption for sample in samples} == {caption(k) for k in range(COUNT)}
    assert {sample.picture.shape for sample in samples} == {(SIZE, SIZE, 3)} and not source.skipped
    assert len({sample.picture.tobytes() for sample in samples}) == COUNT


@pytest.mark.parametrize(("name", "dtype"), [("cache", torch.bfloat16), ("reference", torch.float16)])
def test_every_encoded_sample_is_there(formats, name, dtype):
    source = open_source(formats[name].data)
    found = {float(sample.latent[0, 0, 0]): sample for sample in source.samples(range(COUNT))}
    assert len(found) == COUNT and not source.skipped
    for made in encoded(COUNT, SIZE):
        sample = found[float(made.latent[0, 0, 0].to(dtype))]
        assert torch.equal(sample.latent.float(), made.latent.to(dtype).float())
        assert torch.equal(sample.text.float(), made.text.to(dtype).float())
        assert sample.latent.shape == (32, 2, 2) and 80 <= len(sample.text) <= 160


def test_the_cache_is_as_sprint_cache_would_verify_it(formats):
    files = list(verify(Path(formats["cache"].data.path)))
    shards = ("000000", "000001", "000002")
    assert sorted(file.name for file in files) == sorted(
        f"{n}.{kind}" for n in shards for kind in ("json", "tar")
    )


def test_bytes_are_those_of_the_files(formats):
    tensors = 2 * (32 * 2 * 2 + 2304 * np.mean([len(x.text) for x in encoded(COUNT, SIZE)]))
    assert tensors < formats["cache"].bytes < tensors + 2**13
    pictures = np.mean([len(picture) for picture in jpegs(COUNT, SIZE)])
    assert pictures < formats["folder"].bytes < pictures + 100 and formats[SCENES].bytes == 0


def test_pictures_weigh_what_photographs_do():
    assert 200_000 < len(next(jpegs(1, 1024))) < 400_000
    assert list(jpegs(2, SIZE)) == list(jpegs(2, SIZE))


def test_without_the_library_one_format_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(make_formats(tmp_path, 1, SIZE)) == ["folder", "webdataset", *ENCODED, SCENES]


# ---- reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_those_of_the_loop(formats, workers):
    for name, each in formats.items():
        source, waits = open_source(each.data), []
        batches = list(Pass(source, 4, 2, workers).batches(waits))
        assert len(batches) == len(waits) == 2 and min(waits) >= 0
        if name in ENCODED:
            assert all(isinstance(batch, Batch) and batch.latent.shape == (2, 32, 2, 2) for batch in batches)
            assert all(batch.text.shape[1] % 16 == 0 for batch in batches)
        else:
            captions = [item.caption for batch in batches for item in batch]
            assert captions == [item.caption for item in source.samples(range(4))]


def test_a_pass_counts_all_threads():
    class Busy:
        def samples(self, positions):
            until = time.thread_time() + 0.05
            while time.thread_time() < until:
                pass
            return [None] * len(positions)

    each = Pass(Busy(), 4, 1, 2)
    each(), each()
    assert len(each.cpu) == len(each.queued) == 2
    assert all(0.2 <= seconds < 0.3 for seconds in each.cpu)


def test_the_wait_for_a_core_is_known_or_zero(monkeypatch, tmp_path):
    (tmp_path / "schedstat").write_text("9000000000 250000000 7\n")
    monkeypatch.setattr(bench_data, "QUEUE", tmp_path / "schedstat")
    assert bench_data.waited_for_a_core() == 0.25
    monkeypatch.setattr(bench_data, "QUEUE", tmp_path / "none")
    assert bench_data.waited_for_a_core() == 0.0


def test_a_round_is_long_enough(monkeypatch):
    ticks = iter([10.0, 10.25])  # a pass takes a quarter of a second
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), process_time=time.process_time)
    monkeypatch.setattr(bench_data, "time", clock)
    assert bench_data.samples_for(bench_data.Hashes(), 2, 1, seconds=0.9) == 8


def test_rates_of_known_seconds():
    one, two = Pass(None, 100, 10, 1), Pass(None, 100, 10, 2)
    one.cpu, one.queued = [9.0, 0.2, 0.2, 0.4], [9.0, 0.0, 1.0, 0.0]  # the first is the warm-up
    two.cpu, two.queued = [9.0, 0.3, 0.3, 0.3], [9.0, 0.5, 0.5, 0.5]
    found = rates_of({1: ([1.0, 2.0, 2.0], one), 2: ([1.0, 1.0, 1.0], two)})
    row = found["workers"]["1"]
    assert row["samples_per_second"] == {"median": 50.0, "min": 50.0, "max": 100.0}
    assert row["core_each"] == {"median": 100.0, "min": 50.0, "max": 100.0}
    assert row["cpu_ms_per_sample"] == {"median": 2.0, "min": 2.0, "max": 4.0}
    assert found["two_workers_over_one"]["measured"] == {"median": 2.0, "min": 1.0, "max": 2.0}
    assert found["two_workers_over_one"]["core_each"]["median"] == 2.0
    assert rates_of({2: ([1.0], two)})["two_workers_over_one"] == {}


def test_a_format_with_bad_samples_has_no_figures(formats):
    lame = formats["folder"]._replace(data=replace(formats["folder"].data, bad_share=1.0))
    picture = Path(lame.data.path, "000003.jpg")
    whole = picture.read_bytes()
    try:
        picture.write_bytes(whole[:500])
        with pytest.raises(
            SprintError, match=r"folder: samples were passed over \(\{'unreadable picture': 1"
        ):
            bench_data.measure({"folder": lame}, arguments(batch=5, samples=5))
    finally:
        picture.write_bytes(whole)


# ---- the need -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "need", "expected"),
    [
        ({1: 30.0, 2: 50.0, 4: 90.0}, 45.0, Verdict(2, 50 / 45)),
        ({4: 90.0, 1: 45.0}, 45.0, Verdict(1, 1.0)),
        ({1: 30.0, 2: 44.9, 4: 40.0}, 45.0, Verdict(None, 44.9 / 45)),
    ],
)
def test_the_fewest_workers_that_keep_up(rates, need, expected):
    assert verdict(rates, need) == expected


def test_need_from_counted_flops(tmp_path):
    file = tmp_path / "counts.json"
    counts = {"batch": 2, "G": {"all": {"flops": 3 * 98.9e12}}, "D": {"all": {"flops": 98.9e12}}}
    file.write_text(json.dumps(counts))
    need = need_by_flops(file)
    assert math.isclose(need.samples_per_second, 4.0) and need.how.startswith("assumed, not measured")
    file.write_text("{}")
    for lacking in (file, tmp_path / "none"):
        with pytest.raises(SprintError, match=r"no counted FLOPs there .*--need"):
            need_by_flops(lacking)


def test_the_counted_flops_of_the_repository_can_be_read():
    file = bench_data.RESULTS / bench_data.COUNTED
    assert 20 < need_by_flops(file).samples_per_second < 100


def test_need_of_scenes_is_that_of_the_tiny_recipe(monkeypatch):
    asked = []

    def update_of(variant, request, checkpointing):
        asked.append((variant.name, request.network, request.batch))
        return lambda step: time.sleep(0.002)

    monkeypatch.setattr(bench_data, "update_of", update_of)
    need = bench_data.need_of_scenes(rounds=2)
    assert asked == [("ours", "tiny", 32)] and need.how.startswith("measured")
    assert 0 < need.samples_per_second <= 2 * 32 / 0.004


def test_conclusions_of_known_rates():
    rows = {
        str(workers): {"samples_per_second": {"median": rate}, "core_each": {"median": 2 * rate}}
        | {"cpu_ms_per_sample": {"median": 10.0 * workers}}
        for workers, rate in ((1, 20.0), (2, 30.0))
    }
    found = judged({"workers": rows}, Need(40.0, "given"))
    assert found["verdict"]["measured"] == {"workers": None, "factor": 0.75}
    assert found["verdict"]["core_each"] == {"workers": 1, "factor": 1.0}
    assert math.isclose(found["cores_at_need"], 0.4)


# ---- the command --------------------------------------------------------------------------------------

SMALL = [
    "--size",
    "64",
    "--samples",
    "4",
    "--batch",
    "2",
    "--workers",
    "1",
    "2",
    "--rounds",
    "1",
    "--seconds",
    "0",
]


@pytest.mark.parametrize(("need", "word"), [("0.001", "with 1, "), ("1e9", "**no**: 0.00 of the need")])
def test_command_judges_and_writes(formats, need, word, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_data, "make_formats", lambda folder, count, size: formats)
    monkeypatch.setattr(bench_data, "need_of_scenes", lambda rounds: Need(1.0, "measured: made up"))
    assert bench_data.main([*SMALL, "--need", need]) == 0
    written = json.loads((tmp_path / "results" / "data.json").read_text())
    assert written["environment"]["cpu"] and written["samples"] == 4
    assert list(written["formats"]) == [*formats, "no lock"]
    for name in formats:
        assert list(written["formats"][name]["workers"]) == ["1", "2"]
    page = capsys.readouterr().out
    for name in (*PICTURES, *ENCODED):
        assert any(line.startswith(f"| {name} |") and word in line for line in page.splitlines())
    assert "Need of every format but scenes: given." in page and "Pictures must also be encoded" in page


def test_quick_writes_nothing(formats, monkeypatch, capsys, tmp_path):
    del (few := dict(formats))["huggingface"]
    monkeypatch.setattr(bench_data, "run", lambda args, folder: asked.append(args) or results)
    asked, results = [], {"size": 64, "samples": 4, "batch": 2, "rounds": 1, "cores": 2}
    results |= {"load_average": [0.0, 0.0], "formats": bench_data.measure(few, arguments(rounds=1))}
    for name in few:
        results["formats"][name] |= judged(results["formats"][name], Need(1.0, "given"))
    assert bench_data.main(["--quick"]) == 0
    assert asked[0].workers == [1, 2] and asked[0].samples == 32
    assert "huggingface is skipped: pip install" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--size 100", "multiple of 32"),
        ("--size 512", "say with --need"),
        ("--workers 1 0", "--workers 0: it must be at least 1"),
        ("--batch 0", "--batch 0: it must be at least 1"),
        ("--rounds 0", "--rounds 0: it must be at least 1"),
        ("--samples 12", "multiple of --batch 8"),
        ("--need 0", "more than 0"),
    ],
)
def test_wrong_input_is_one_line(wrong, words, capsys):
    assert bench_data.main(wrong.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_data: ") and words in error and error.count("\n") == 1
