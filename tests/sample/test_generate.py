import json
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from sprint.base.errors import SprintError
from sprint.cli.sample import compiler_errors
from sprint.maths.samplers import Noise
from sprint.maths.schedule import student_times
from sprint.models.encoders import PIXELS_AT_ONCE, Family
from sprint.models.sana.encoders import SanaEncoders
from sprint.models.sana.presets import transformer_config
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME
from sprint.models.view import TrigFlowView
from sprint.sample.generate import StudentGenerator, TeacherGenerator
from sprint.sample.load import load_generator
from sprint.weights.settings import Settings, read_settings
from tests.tolerance import assert_close, of_network

PROMPTS = ["a red circle", "two blue squares", "a dot"]
SEEDS = [3, 1, 4]
CHANNELS, WIDTH, TEXT_WIDTH, SIZE = 4, 64, 32, 32


# ---- a family of a few thousand weights ---------------------------------------------------------------


def mini_family(max_length: int = 20, instruction: bool = False) -> Family:
    """One token a byte, one layer of Gemma2, an autoencoder with cells of 4 pixels; random weights."""
    torch.manual_seed(0)
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = GemmaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(names),
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
        )
    )
    stages = {f"{end}_block_types": ("ResBlock",) * 3 for end in ("encoder", "decoder")}
    stages |= {f"{end}_block_out_channels": (8, 8, 8) for end in ("encoder", "decoder")}
    stages |= {f"{end}_layers_per_block": (1, 1, 1) for end in ("encoder", "decoder")}
    stages |= {f"{end}_qkv_multiscales": ((), (), ()) for end in ("encoder", "decoder")}
    autoencoder = AutoencoderDC(latent_channels=CHANNELS, scaling_factor=0.7, **stages)
    return SanaEncoders(tokenizer, encoder.eval(), autoencoder.eval(), max_length, instruction)


def mini_network(seed: int = 0, **traits: bool) -> SanaTransformer2DModel:
    """Depth 2; a base teacher, or with qk_norm and guidance_embeds a student. No two weights are equal."""
    torch.manual_seed(seed)
    config = transformer_config("tiny", **traits) | {
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": WIDTH // 2,
        "cross_attention_dim": WIDTH,
        "caption_channels": TEXT_WIDTH,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
    }
    network = SanaTransformer2DModel(**config).eval()
    for name, p in network.named_parameters():
        p.data = torch.randn_like(p) * 0.1 + ("norm" in name)
    return network


def mini_student(seed: int = 0) -> SanaTransformer2DModel:
    return mini_network(seed, qk_norm=True, guidance_embeds=True)


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.fixture(scope="module")
def family():
    return mini_family()


@pytest.fixture(scope="module")
def student(family):
    return StudentGenerator(TrigFlowView(mini_student(), DENSE_TIME), family)


@pytest.fixture(scope="module")
def teacher(family):
    return TeacherGenerator(TrigFlowView(mini_network(), SPARSE_TIME), family)


# ---- students -----------------------------------------------------------------------------------------


def test_student_draws_one_picture_a_prompt(student):
    pictures = student.pictures(PROMPTS, SEEDS, 2)
    assert pictures.shape == (3, SIZE, SIZE, 3) and pictures.dtype == np.uint8
    assert pictures.std() > 10
    assert levels_apart(pictures[0], pictures[1]) > 50


@torch.no_grad()
def test_one_step_is_the_negated_velocity(student):
    """At t = π/2, f = −σ_d · F: x_fm is the noise, and F the network's own velocity."""
    latents = student.latents(PROMPTS[:1], SEEDS[:1], guidance_scale=5.0, times=[math.pi / 2, 0.0])
    noise = torch.randn(1, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(SEEDS[0]))
    text, mask = student.family.encode_prompts(PROMPTS[:1])
    (v,) = student.view.network(
        noise,
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        timestep=torch.ones(1),
        guidance=torch.tensor([0.5]),
        return_dict=False,
    )
    assert_close(latents, noise - v, of_network(student.view, student.family.text_encoder))


def test_guidance_is_embedded(student):
    weak, strong = (student.latents(PROMPTS[:1], [0], 1, guidance_scale=w) for w in (1.0, 5.0))
    assert (weak - strong).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_student_picture_does_not_depend_on_its_batch(student, steps):
    together = student.pictures(PROMPTS, SEEDS, steps)
    for i in range(3):
        assert levels_apart(student.pictures([PROMPTS[i]], [SEEDS[i]], steps)[0], together[i]) <= 1


def test_own_list_of_times(student):
    own = student.latents(PROMPTS, SEEDS, times=[1.5708, 1.3, 0.0])
    assert torch.equal(own, student.latents(PROMPTS, SEEDS, 2))
    five = student.latents(PROMPTS, SEEDS, 5, times=[1.5, 1.3, 1.1, 0.6, 0.3, 0.0])
    assert five.shape == (3, CHANNELS, 8, 8)


@pytest.mark.parametrize("steps", [0, 5, -1])
def test_student_steps_outside_one_to_four(student, steps):
    with pytest.raises(SprintError, match=f"steps {steps}: a student takes 1 to 4; .*list of times"):
        student.pictures(PROMPTS, SEEDS, steps)


# ---- teachers -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_teacher_guidance_by_hand(teacher):
    """One step from π/2: z = ε − (v_u + w (v_c − v_u)), two forwards, the null prompt under its own mask."""
    latents = teacher.latents(PROMPTS[:1], SEEDS[:1], 1, guidance_scale=3.0)
    noise = torch.randn(1, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(SEEDS[0]))
    v = {}
    for prompt in (PROMPTS[0], ""):
        text, mask = teacher.family.encode_prompts([prompt])
        (v[prompt],) = teacher.view.network(
            noise, text, torch.full((1,), 1000.0), encoder_attention_mask=mask, return_dict=False
        )
    guided = v[""] + 3.0 * (v[PROMPTS[0]] - v[""])
    assert (v[""] - v[PROMPTS[0]]).abs().max() > 1e-3
    twice = of_network(teacher.view, teacher.family.text_encoder)
    assert_close(latents, noise - guided, (2 * 3.0 + 1) * twice)  # w v_c and (1 − w) v_u err apart


@pytest.mark.parametrize("instruction", [False, True])
def test_teacher_pictures_are_those_of_diffusers(tmp_path, instruction):
    """Euler steps on the same flow times are the same rotation, whichever clock the steps are written in."""
    family = mini_family(instruction=instruction)
    network = mini_network(seed=1)
    steps, scheduler = 5, FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = SanaPipeline(family.tokenizer, family.text_encoder, family.autoencoder, network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        sigmas=np.linspace(1, 1 / steps, steps).tolist(),
        guidance_scale=3.0,
        height=SIZE,
        width=SIZE,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        use_resolution_binning=False,
        max_sequence_length=family.max_length,
        output_type="np",
        **({} if instruction else {"complex_human_instruction": None}),
    ).images
    pipeline.save_pretrained(tmp_path / "teacher")
    text = {"max_length": family.max_length, "instruction": instruction}
    (tmp_path / "teacher" / "sprint.json").write_text(json.dumps({"text": text, "size": SIZE}))

    ours = load_generator(str(tmp_path / "teacher"))
    assert isinstance(ours, TeacherGenerator) and ours.view.time_scale == SPARSE_TIME
    pictures = ours.pictures(PROMPTS, SEEDS, steps, guidance_scale=3.0)
    assert levels_apart(pictures, (theirs * 255).round()) <= 1


def test_teacher_picture_does_not_depend_on_its_batch(teacher):
    together = teacher.pictures(PROMPTS, SEEDS, 6)
    assert levels_apart(teacher.pictures(PROMPTS[1:2], SEEDS[1:2], 6)[0], together[1]) <= 1


# ---- less work, the same pictures -----------------------------------------------------------------------


@pytest.mark.parametrize("instruction", [False, True])
def test_trimmed_text_lacks_padding_only(instruction):
    family = mini_family(max_length=40, instruction=instruction)
    text, mask = family.encode_prompts(PROMPTS)
    trimmed, trimmed_mask = family.encode_trimmed(PROMPTS)
    assert text.shape == (3, 40, TEXT_WIDTH) and trimmed.shape == (3, 32, TEXT_WIDTH)
    assert mask[:, 32:].sum() == 0 and torch.equal(mask[:, :32], trimmed_mask)
    real = trimmed_mask.bool()
    assert_close(trimmed[real], text[:, :32][real], of_network(family.text_encoder))


@pytest.mark.parametrize(("unit", "length"), [(1, 17), (16, 32), (64, 40)])
def test_trimmed_text_comes_in_units(unit, length):
    """A byte of the longest prompt is a token."""
    family = mini_family(max_length=40)
    assert family.encode_trimmed(["a", "a" * 17], unit)[1].shape == (2, length)
    assert family.encode_trimmed(["a" * 100], unit)[1].shape[1] == 40


def test_padding_changes_no_latent(student):
    short = student.latents(["a dot"], [5], 2)
    text, mask = student.family.encode_prompts(["a dot"])
    noise = Noise([5], (CHANNELS, 8, 8))
    padded = student.denoise(text, mask, torch.tensor([4.5]), noise, student.times(2))
    assert text.shape[1] == 20 > student.family.encode_trimmed(["a dot"])[1].shape[1]
    assert_close(short, padded, 2 * of_network(student.view, student.family.text_encoder))  # two steps


def test_decoding_a_few_at_a_time(student, monkeypatch):
    latents = student.latents(PROMPTS, SEEDS, 1)
    sizes = []
    handle = student.family.autoencoder.decoder.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    together = student.family.decode_latents(latents)
    monkeypatch.setitem(PIXELS_AT_ONCE, "cpu", 2 * SIZE * SIZE)
    in_parts = student.family.decode_latents(latents)
    monkeypatch.setitem(PIXELS_AT_ONCE, "cpu", 1)
    one_by_one = student.family.decode_latents(latents)
    handle.remove()
    assert sizes == [3, 2, 1, 1, 1, 1]
    assert together.shape == (3, SIZE, SIZE, 3) and together.dtype == np.uint8
    assert levels_apart(together, in_parts) <= 1 and levels_apart(together, one_by_one) <= 1


def test_channels_last_changes_no_value(family):
    other = mini_family().channels_last()
    weights = family.autoencoder.state_dict()
    for name, tensor in other.autoencoder.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert not other.autoencoder.decoder.conv_in.weight.is_contiguous()


def test_latents_may_meet_autograd(student):
    """Pictures are drawn in inference mode; nothing of it stays behind."""
    student.pictures(PROMPTS[:1], [0], 1)
    weight = torch.ones(1, requires_grad=True)
    (student.latents(PROMPTS[:1], [0], 1) * weight).sum().backward()
    assert weight.grad is not None


# ---- compiled -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_is_two_whole_graphs(monkeypatch):
    """Network and decoder, each captured whole and once for two steps and two calls of one shape."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    original = nn.Module.compile
    wanted = []

    def compile_without_code(module, fullgraph, dynamic, mode):
        wanted.append(mode)
        original(module, fullgraph=fullgraph, dynamic=dynamic, backend=counter)

    monkeypatch.setattr(nn.Module, "compile", compile_without_code)
    plain, compiled = (
        StudentGenerator(TrigFlowView(mini_student(), DENSE_TIME), mini_family()) for _ in "ab"
    )
    assert compiled.compile() is compiled and wanted == ["default"] * 2
    assert counter.frame_count == 0
    for seed in (1, 2):
        ours = compiled.pictures(["a dot"], [seed], 2)
        assert levels_apart(ours, plain.pictures(["a dot"], [seed], 2)) <= 1
    assert counter.frame_count == 2


@inductor.patch({"cpp.cxx": (None, "/no/compiler"), "fx_graph_cache": False})
def test_no_compiler_is_one_line():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (x + 1).sin())
    words = r"--compile does not work here: .*compiler"
    with pytest.raises(SprintError, match=words) as error, compiler_errors():
        compiled(torch.ones(3))
    assert "\n" not in str(error.value)


# ---- what cannot be drawn -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("prompt 2 of 2 is empty", {"prompts": ["a dot", "  "], "seeds": [0, 1]}),
        ("no prompt", {"prompts": [], "seeds": []}),
        ("1 prompts but 2 seeds", {"seeds": [0, 1]}),
        ("seed -1", {"seeds": [-1]}),
        ("guidance nan", {"guidance_scale": math.nan}),
        ("guidance -2", {"guidance_scale": -2.0}),
        ("give a number of steps or a list", {"num_inference_steps": None}),
        ("steps 2, but the list of times makes 1", {"times": [1.5, 0.0]}),
        ("fall strictly", {"num_inference_steps": None, "times": [1.0, 1.2, 0.0]}),
        ("start at most", {"num_inference_steps": None, "times": [1.8, 0.0]}),
        ("size 33 is not a multiple of 4 pixels; the nearest is 32 or 36", {"size": 33}),
        ("size 0 is not a multiple of 4 pixels; the nearest is 4", {"size": 0}),
    ],
)
def test_wrong_input_is_one_line(student, teacher, words, arguments):
    good = {"prompts": ["a dot"], "seeds": [0], "num_inference_steps": 2}
    for generator in (student, teacher):
        with pytest.raises(SprintError, match=words) as error:
            generator.pictures(**good | arguments)
        assert "\n" not in str(error.value)


def test_other_sizes(student):
    assert student.pictures(["a dot"], [0], 1, size=44).shape == (1, 44, 44, 3)


def test_long_prompt_is_cut_with_a_warning(student, caplog):
    with caplog.at_level(logging.WARNING):
        long = student.pictures(["a red circle on a blue square"], [0], 1)
    assert "prompt cut to 20 tokens" in caplog.text
    short = student.pictures(["a red circle on a blue square"[:19]], [0], 1)
    assert levels_apart(long, short) == 0


# ---- settings of a folder -----------------------------------------------------------------------------


def test_settings_default_to_those_of_public_models(tmp_path):
    assert read_settings(str(tmp_path)) == Settings(max_length=300, instruction=True, size=None)


def test_own_times_take_the_place_of_default_ones(tmp_path, family):
    text = {"max_length": 20, "instruction": False}
    own = [[1.5708, 1.1, 0], [1.57, 1.3, 1.1, 0.6, 0]]
    (tmp_path / "sprint.json").write_text(json.dumps({"text": text, "size": SIZE, "times": own}))
    settings = read_settings(str(tmp_path))
    assert settings == Settings(20, False, SIZE, ((1.5708, 1.1, 0), (1.57, 1.3, 1.1, 0.6, 0)))
    generator = StudentGenerator(TrigFlowView(mini_student(), DENSE_TIME), family, SIZE, settings.times)
    assert [generator.times(steps) for steps in (2, 4)] == own
    assert generator.times(3) == student_times(3) and generator.times(None, [1.0, 0]) == [1.0, 0]
    assert torch.equal(generator.latents(PROMPTS, SEEDS, 2), generator.latents(PROMPTS, SEEDS, times=own[0]))


def test_settings_of_a_folder(tmp_path):
    (tmp_path / "sprint.json").write_text('{"text": {"max_length": 32, "instruction": false}, "size": 64}')
    assert read_settings(str(tmp_path)) == Settings(32, False, 64)


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"text": {"length": 3}}',
        '{"text": {"max_length": "32"}}',
        '{"text": {"instruction": 1}}',
        '{"size": 64.5}',
        '{"times": {"2": [1.57, 1.1, 0]}}',
        '{"times": [[1.57, "1.1", 0]]}',
        '{"times": [[1.57, 1.6, 0]]}',
        '{"times": [[1.57, 1.1, 0], [1.57, 1.2, 0]]}',
        '{"times": [[1.57, 1.3, 1.1, 0.6, 0.3, 0]]}',
    ],
)
def test_broken_settings(tmp_path, content):
    (tmp_path / "sprint.json").write_text(content)
    with pytest.raises(SprintError, match=r"sprint\.json"):
        read_settings(str(tmp_path))


@pytest.mark.parametrize(("name", "words"), [("missing-folder", "no file or folder"), (".", "no model")])
def test_nothing_to_load(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SprintError, match=words):
        load_generator(name)
