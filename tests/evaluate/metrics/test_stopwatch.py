"""Latency: who is called when, what is counted, and the arithmetic. How fast anything is, no test asks."""

import string
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from sprint.base.clock import Clock
from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics import stopwatch as latency
from sprint.evaluate.metrics.stopwatch import (
    PARTS,
    Contender,
    Latency,
    Spread,
    contender,
    flux_contender,
    measure_together,
)
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME
from sprint.models.view import TrigFlowView
from sprint.sample.generate import StudentGenerator, TeacherGenerator
from tests.sample.test_generate import (
    PROMPTS,
    SEEDS,
    mini_family,
    mini_network,
    mini_student,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student():
    return StudentGenerator(TrigFlowView(mini_student(), DENSE_TIME), mini_family())


@pytest.fixture(scope="module")
def teacher():
    return TeacherGenerator(TrigFlowView(mini_network(), SPARSE_TIME), mini_family())


class FakeClock(Clock):
    """Time stands still except where a contender moves it."""

    now = 0.0

    def __init__(self, device):
        super().__init__(device)
        self._mark = lambda: FakeClock.now
        self.restart()


class Recorder:
    """Notes the parts in the order they are entered."""

    def __init__(self):
        self.parts = []

    @contextmanager
    def part(self, name):
        self.parts.append(name)
        yield


@pytest.fixture
def fake_time(monkeypatch):
    monkeypatch.setattr(latency, "Clock", FakeClock)
    monkeypatch.setattr(FakeClock, "now", 0.0)


def pretender(name, calls, takes=lambda call, batch: {"text": 1.0}):
    """Draws nothing; its call number `call` takes so many seconds in each part, and half a second between."""

    def draw(prompts, seeds, clock):
        mine = sum(who == name for who, *_ in calls)
        calls.append((name, tuple(prompts), tuple(seeds)))
        FakeClock.now += 0.5
        for part, seconds in takes(mine, len(prompts)).items():
            with clock.part(part):
                FakeClock.now += seconds

    return Contender(name, steps=1, size=8, device=CPU, dtype=torch.float32, draw=draw)


def figures(seconds, batch=1):
    parts = {part: (0.0,) * len(seconds) for part in PARTS}
    return Latency("student", 1, batch, 64, "cpu", "float32", parts | {"whole": tuple(seconds)})


# ---- arithmetic ---------------------------------------------------------------------------------------


def test_spread():
    assert Spread.of([4.0, 1.0, 3.0, 2.0]) == Spread(2.5, 1.0, 4.0, quartile_1=1.75, quartile_3=3.25)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 7.0)


def test_throughput_is_the_batch_over_the_median_call():
    assert figures([4.0, 1.0, 2.0], batch=10).pictures_per_second == 5.0


def test_faster_is_compared_round_by_round():
    # the machine slows down by a factor of 3 between the rounds; the ratio does not notice
    fast, slow = figures([1.0, 3.0]), figures([10.0, 30.0])
    assert fast.times_faster_than(slow) == Spread(10.0, 10.0, 10.0, 10.0, 10.0)
    with pytest.raises(ValueError):
        fast.times_faster_than(figures([1.0]))


# ---- rounds -------------------------------------------------------------------------------------------


def test_contenders_take_turns_in_every_round(fake_time):
    calls = []
    two = [pretender("a", calls), pretender("b", calls)]
    results = measure_together(two, ["p"], batch_sizes=(1, 2), rounds=2, warmup=1)
    assert [(who, len(prompts)) for who, prompts, _ in calls] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)] * 3
    assert [(x.name, x.batch, x.rounds) for x in results] == [
        ("a", 1, 2),
        ("b", 1, 2),
        ("a", 2, 2),
        ("b", 2, 2),
    ]


def test_warm_up_is_not_counted(fake_time):
    who = pretender("a", [], takes=lambda call, batch: {"text": (100.0, 50.0, 1.0, 2.0, 4.0)[call]})
    [result] = measure_together([who], ["p"], (1,), rounds=3, warmup=2)
    assert result.seconds["text"] == (1.0, 2.0, 4.0)


def test_parts_add_up_to_the_whole(fake_time):
    taken = {"text": 1.0, "network": 4.0, "decoder": 2.0}
    [result] = measure_together([pretender("a", [], lambda call, batch: taken)], ["p"], (1,), 2, 0)
    assert result.seconds == {
        "text": (1.0, 1.0),
        "network": (4.0, 4.0),
        "decoder": (2.0, 2.0),
        "other": (0.5, 0.5),
        "whole": (7.5, 7.5),
    }


def test_every_round_draws_the_first_prompts_and_begins_again_after_the_last(fake_time):
    calls = []
    measure_together([pretender("a", calls)], ["p", "q", "r"], (2, 5), rounds=1, warmup=1)
    expected = [("a", ("p", "q"), (0, 1)), ("a", ("p", "q", "r", "p", "q"), (0, 1, 2, 3, 4))]
    assert calls == expected * 2


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"contenders": []}, "at least one model"),
        ({"prompts": []}, "one prompt"),
        ({"batch_sizes": ()}, "one batch size"),
        ({"batch_sizes": (1, 0)}, r"batch sizes \[1, 0\]"),
        ({"rounds": 0}, "0 rounds"),
        ({"warmup": -1}, "-1 of warm-up"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nothing_to_measure(wrong, said):
    with pytest.raises(SprintError, match=said):
        measure_together(**{"contenders": [pretender("a", [])], "prompts": ["p"]} | wrong)


# ---- students and teachers ----------------------------------------------------------------------------


def test_a_students_parts_and_a_teachers(student, teacher):
    for generator, parts in (
        (student, ["text", "network", "decoder"]),
        (teacher, ["text", "text", "network", "decoder"]),  # its null prompt is text too
    ):
        recorder = Recorder()
        contender(generator, 2).draw(PROMPTS, SEEDS, recorder)
        assert recorder.parts == parts


def test_measuring_changes_no_picture_and_leaves_nothing_behind(student):
    expected, before = student.pictures(PROMPTS, SEEDS, 2, guidance_scale=3.0), student.part
    drawn = contender(student, 2, guidance_scale=3.0).draw(PROMPTS, SEEDS, Clock(CPU))
    assert np.array_equal(drawn, expected)
    assert student.part is before


def test_a_call_that_fails_leaves_the_generator_as_it_was(student):
    before = student.part
    with pytest.raises(SprintError, match="takes 1 to 4"):
        measure_together([contender(student, 9)], ["p"])
    assert student.part is before


def test_a_generator_is_called_as_often_as_asked(student, teacher):
    for generator, name, steps in ((student, "student", (1, 4)), (teacher, "teacher", (3,))):
        forwards = []
        hook = generator.view.network.register_forward_pre_hook(
            lambda module, args, kwargs, seen=forwards: seen.append(
                len(args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
        results = measure_together(
            [contender(generator, count) for count in steps], PROMPTS, (1, 2), rounds=2, warmup=1
        )
        hook.remove()
        per_step = 1 if name == "student" else 2  # guidance doubles the batch
        one_round = [batch * per_step for batch in (1, 2) for count in steps for _ in range(count)]
        assert forwards == one_round * 3
        assert [(x.name, x.steps, x.batch) for x in results] == [
            (name, count, batch) for batch in (1, 2) for count in steps
        ]
        for result in results:
            assert result.size == generator.size and result.dtype == "float32"
            assert "threads" in result.device
            assert all(min(result.seconds[part]) > 0 for part in ("text", "network", "decoder"))


# ---- FLUX-schnell -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    """A FLUX of a few thousand weights, one token a letter, pictures of 32 pixels."""
    torch.manual_seed(0)
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    end = vocab["<|endoftext|>"]
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPTextConfig(
        vocab_size=len(vocab), eos_token_id=end, pad_token_id=end, bos_token_id=end - 1, **tower
    )
    pieces = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase)]
    t5 = T5Config(vocab_size=len(pieces), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.4,
        shift_factor=0.1,
    )
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=1.0),
        autoencoder,
        CLIPTextModel(clip),
        CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77),
        T5EncoderModel(t5),
        T5Tokenizer(vocab=pieces, extra_ids=0),
        transformer,
    )
    folder = tmp_path_factory.mktemp("flux")
    pipeline.save_pretrained(folder)
    return str(folder)


def test_flux_by_part_draws_what_its_pipeline_draws(flux_folder):
    recorder = Recorder()
    drawn = flux_contender(flux_folder, dtype=torch.float32, size=32).draw(PROMPTS, SEEDS, recorder)
    assert recorder.parts == ["text", "network", "decoder"]
    expected = FluxPipeline.from_pretrained(flux_folder)(
        PROMPTS,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=0.0,
        max_sequence_length=256,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
    ).images
    assert expected.std() > 0.05
    assert np.abs(np.stack(drawn) - 255 * expected).max() < 1


def test_flux_beside_a_student(flux_folder, student):
    flux = flux_contender(flux_folder, dtype=torch.float32, steps=2, size=32)
    results = measure_together([contender(student, 1), flux], PROMPTS, (1, 2), rounds=1, warmup=0)
    assert [(x.name, x.steps, x.batch) for x in results] == [
        ("student", 1, 1),
        ("FLUX-schnell", 2, 1),
        ("student", 1, 2),
        ("FLUX-schnell", 2, 2),
    ]
    assert all(min(results[1].seconds[part]) > 0 for part in ("text", "network", "decoder"))


def test_without_flux_one_line_says_what_to_fetch(tmp_path):
    with pytest.raises(NotHereError, match=r"FLUX-schnell left out.*hf download nobody/flux") as caught:
        flux_contender("nobody/flux")
    assert "\n" not in str(caught.value)
    with pytest.raises(NotHereError, match="FLUX-schnell left out"):
        flux_contender(str(tmp_path))


def test_flux_is_never_downloaded(monkeypatch):
    def not_here(name, local_files_only=False, use_safetensors=None, **rest):
        assert local_files_only and use_safetensors
        raise OSError("not here")

    monkeypatch.setattr(FluxPipeline, "from_pretrained", not_here)
    with pytest.raises(NotHereError, match="not here"):
        flux_contender()
