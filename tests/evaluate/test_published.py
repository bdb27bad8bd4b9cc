from sprint.evaluate.published import FLUX_SCHNELL, PUBLISHED, published, published_size
from sprint.models.sana.presets import size_of, transformer_config


def test_rows_are_found_by_model_and_steps():
    assert (published("0.6b", 1).latency, published("0.6b", 1).clip) == (0.21, 28.04)
    assert (published("1.6b", 2).throughput, published("1.6b", 2).fid) == (5.68, 6.50)
    assert published(FLUX_SCHNELL, 4).geneval == 0.71
    assert published("0.6b", 3) is None and published("tiny", 1) is None


def test_every_model_has_1_2_and_4_steps_and_more_steps_take_longer():
    for model in ("0.6b", "1.6b", FLUX_SCHNELL):
        rows = [row for row in PUBLISHED if row.model == model]
        assert [row.steps for row in rows] == [1, 2, 4]
        assert sorted(rows, key=lambda row: row.latency) == rows
        assert sorted(rows, key=lambda row: -row.throughput) == rows


def test_sizes_that_the_paper_did_not_distil_have_no_row():
    assert published_size("0.6b") == "0.6b" and published_size("1.6b") == "1.6b"
    assert published_size("4.8b") is published_size("tiny") is published_size(None) is None


def test_a_size_is_known_by_the_network():
    for size in ("0.6b", "1.6b", "4.8b", "tiny"):
        assert size_of(transformer_config(size, qk_norm=True, guidance_embeds=True)) == size
    assert size_of(transformer_config("0.6b") | {"num_layers": 27}) is None
