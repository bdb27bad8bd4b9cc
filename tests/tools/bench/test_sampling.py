"""tools/bench/sampling.py on a student of a few thousand weights."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Gemma2Model

from sprint.base.errors import SprintError
from sprint.models.sana.encoders import human_instruction
from sprint.recipe.schema import Precision
from tests.sample.test_generate import (
    PROMPTS,
    SIZE,
    levels_apart,
    mini_family,
    mini_student,
)
from tools.bench import sampling as bench_sampling
from tools.bench.sampling import (
    LEVELS,
    Case,
    Ours,
    Theirs,
    check,
    differences,
    measure_case,
)

FP32 = torch.float32


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(mini_student(), mini_family(), SIZE, "random", tuple(PROMPTS))


def test_both_draw_the_same_and_every_part_is_timed(case):
    results = measure_case(case, [1, 2], "cpu", Precision.fp32, False, rounds=1)
    assert results["weights"] == "random" and results["size"] == SIZE
    assert list(results["batches"]) == ["1", "2"]
    for row in results["batches"].values():
        assert list(row["difference"]["ours"]) == ["1", "2", "4"]
        assert all(found["most"] <= LEVELS for found in row["difference"]["ours"].values())
        parts = {"text", "decoder"} | {f"{part}, {n}" for part in ("network", "whole") for n in (1, 2, 4)}
        assert set(row["seconds"]) == set(row["times_faster"]) == parts
        seconds = row["seconds"]["whole, 4"]
        faster = row["times_faster"]["whole, 4"]["ours"]["median"]
        assert math.isclose(faster, seconds["diffusers"]["median"] / seconds["ours"]["median"])
    assert results["batches"]["1"]["text_tokens"] == {"diffusers": 20, "ours": 16}
    json.dumps(results, allow_nan=False)
    assert "whole, 4" in bench_sampling.page("mini", results)


def test_parts_make_the_whole(case):
    for contender in (Ours(case.copied("cpu", FP32)), Theirs(case.copied("cpu", FP32))):
        text = contender.text([PROMPTS[0]])
        decoded = contender.decoded(contender.latents(text, [3], 2))
        whole = contender.pictures([PROMPTS[0]], [3], 2)
        assert levels_apart(whole[0], np.array(decoded[0])) <= 1


def test_bf16_is_first_checked_in_fp32(case):
    results = measure_case(case, [1], "cpu", Precision.bf16, False, rounds=1)
    assert results["precision"] == "bf16"
    assert max(found["most"] for found in results["difference in fp32"].values()) <= LEVELS
    assert results["batches"]["1"]["difference"]["ours"]["1"]["most"] >= 0


def test_other_weights_are_noticed(case):
    other = replace(case, network=mini_student(seed=1))
    found = differences(Ours(case.copied("cpu", FP32)), Theirs(other.copied("cpu", FP32)), [PROMPTS[0]], [0])
    assert min(levels["most"] for levels in found.values()) > 20
    with pytest.raises(SprintError, match=r"1 steps: \d+/255 from diffusers, more than 2"):
        check(found)


def test_plain_pictures_prove_nothing():
    with pytest.raises(SprintError, match="plain"):
        check({"1": {"most": 0, "mean": 0.0, "contrast": 0.2}})


def test_contenders_share_no_weights(case):
    mine, yours = (case.copied("cpu", FP32) for _ in range(2))
    for a, b in ((mine, yours), (mine, case)):
        assert a.network.proj_out.weight.data_ptr() != b.network.proj_out.weight.data_ptr()
        decoders = [x.family.autoencoder.decoder.conv_in.weight.data_ptr() for x in (a, b)]
        assert decoders[0] != decoders[1]


def test_words_are_tokens():
    tokenizer = bench_sampling.word_tokenizer()
    prefix = "\n".join(human_instruction())
    ids = tokenizer([prefix + prompt for prompt in bench_sampling.SENTENCES]).input_ids
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in row for row in ids)
    assert 150 < len(tokenizer.encode(prefix)) < 300  # Gemma's own tokens: about as many
    assert tokenizer("a paper boat").input_ids == tokenizer("a  paper boat").input_ids


def test_random_cases_have_the_shapes_they_claim(monkeypatch):
    monkeypatch.setattr(Gemma2Model, "post_init", lambda self: None)
    with torch.device("meta"):
        small, large = bench_sampling.random_case("20m"), bench_sampling.random_case("0.6b")
    assert small.weights == large.weights == "random"
    assert small.size == 256 and large.size == 1024
    assert 20e6 < sum(p.numel() for p in small.network.parameters()) < 21e6
    assert 0.59e9 < sum(p.numel() for p in large.network.parameters()) < 0.61e9
    layers = sum(p.numel() for p in large.family.text_encoder.layers.parameters())
    assert 2.0e9 < layers < 2.05e9  # Gemma2 2B less its vocabulary
    assert sum(p.numel() for p in large.family.autoencoder.parameters()) == 312_250_275


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "at least 1"),
        (["--rounds", "0"], "at least 1"),
        (["--student", "missing"], "no file"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, capsys):
    assert bench_sampling.main(["--network", "tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_sampling: ") and words in error and error.count("\n") == 1


def test_command_writes_results(case, monkeypatch, capsys):
    written = {}
    monkeypatch.setattr(bench_sampling, "make_case", lambda name, student: case)
    monkeypatch.setattr(
        bench_sampling, "write_results", lambda name, results: written.update({name: results})
    )
    assert bench_sampling.main(["--network", "tiny", "--batch", "2", "--rounds", "1"]) == 0
    assert list(written["bench_sampling-tiny-cpu"]["cases"]["tiny"]["batches"]) == ["1", "2"]
    assert "levels of 255 from diffusers" in capsys.readouterr().out
