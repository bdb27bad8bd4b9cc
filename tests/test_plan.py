import json
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import save_file
from torch.autograd.graph import saved_tensors_hooks

from sprint.errors import SprintError
from sprint.models.heads import DiscriminatorHeads
from sprint.models.presets import transformer_config
from sprint.optim import build_optimizer
from sprint.plan import SAVED, dry_run, optimizer_state_numel
from sprint.recipe import Optimizer, OptimizerKind, Precision, Recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
COUNTS = {  # REFERENCE: teacher, with QK-norm, student
    "0.6b": (591_747_872, 591_876_896, 593_502_369),
    "1.6b": (1_604_462_752, 1_604_641_952, 1_610_239_713),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Like a pipeline: a small transformer, and the config of an autoencoder with cells of 8 pixels."""
    folder = tmp_path_factory.mktemp("teacher")
    SanaTransformer2DModel(**transformer_config("tiny")).save_pretrained(folder / "transformer")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"encoder_block_out_channels": [8, 8, 8, 8]}))
    return folder


def small(teacher: Path, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / "tiny.yaml", [f"teacher={teacher}", *overrides])


# ---- counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_equal_the_published_networks(name):
    plan = dry_run(load_recipe(RECIPES / f"{name}.yaml"))
    *networks, heads = plan.parameters.values()
    assert tuple(networks) == COUNTS[name]
    assert heads / 4 == pytest.approx({"0.6b": 13.28e6, "1.6b": 50.19e6}[name], rel=1e-3)
    for count in networks:
        assert f"{count:,}" in str(plan)


def test_a_teacher_on_disk_is_read_from_its_files(teacher):
    counts = list(dry_run(small(teacher)).parameters.values())
    network = SanaTransformer2DModel.from_pretrained(teacher / "transformer")
    width, depth = 128, 4
    assert counts[0] == sum(p.numel() for p in network.parameters())
    assert counts[1] == counts[0] + depth * 4 * width  # norm_q and norm_k, twice a block
    assert counts[2] == counts[1] + (256 * width + width) + (width * width + width) + (width + 1)


def test_a_single_file_gives_the_same_plan_as_its_folder(teacher, tmp_path):
    network = SanaTransformer2DModel.from_pretrained(teacher / "transformer")
    file = tmp_path / "tiny.safetensors"
    save_file(network.state_dict(), file)
    from_file, from_folder = dry_run(small(file, f"teacher_family={teacher}")), dry_run(small(teacher))
    assert from_file.parameters == from_folder.parameters
    assert from_file.stages == from_folder.stages


# ---- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "betas"), [("adamw", (0.9, 0.99)), ("came", (0.9, 0.999, 0.9999))])
def test_optimizer_state_is_what_the_optimizer_allocates(kind, betas):
    network = torch.nn.Sequential(torch.nn.Conv2d(6, 10, 3), torch.nn.Linear(7, 5))
    optimizer = build_optimizer(network.parameters(), Optimizer(OptimizerKind(kind), 1e-3, betas))
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    shapes = [p.shape for p in network.parameters()]
    assert optimizer_state_numel(shapes, OptimizerKind(kind)) == sum(t.numel() for t in kept)


def test_stage_two_of_the_16b_by_hand():
    (_, distill) = dry_run(
        load_recipe(RECIPES / "1.6b.yaml", ["distill.ema_decay=0.99", "micro_batch_size=0"])
    ).stages
    student, frozen = 1_610_239_713, 1_604_641_952
    parts = distill.memory[32]
    assert parts["weights (fp32)"] == parts["gradients (fp32)"] == parts["EMA (fp32)"] == 4 * student
    assert parts["optimizer state (came, fp32)"] == pytest.approx(4 * student, rel=0.01)
    assert (parts["bf16 copies"], parts["frozen teacher"]) == (2 * student, 2 * frozen)
    student_block = 2240 * (124 * 1024 + 18 * 300)
    frozen_block = 2240 * (89 * 1024 + 4 * 300)
    a_picture = 40 * student_block + 20 * frozen_block + 4 * 26 * 1024 * 2240
    assert parts["activations"] == 16 * a_picture  # 512 pictures over 32 GPUs
    recomputed = 60 * 4 * 1024 * 2240 + student_block + 4 * 26 * 1024 * 2240
    assert parts["activations, recomputed"] == 16 * recomputed
    assert distill.memory[1]["activations"] == 32 * parts["activations"]
    _, capped = dry_run(
        load_recipe(RECIPES / "1.6b.yaml")
    ).stages  # 16 pictures in one forward, however many GPUs
    assert capped.memory[1]["activations"] == capped.memory[32]["activations"] == parts["activations"]
    assert distill.memory[1]["frozen teacher"] == parts["frozen teacher"]  # nothing is sharded


def test_what_is_switched_off_takes_no_memory(teacher):
    plan = dry_run(small(teacher, "adapt.steps=0", "distill.adversarial.weight=0", "distill.ema_decay=0"))
    (distill,) = plan.stages
    assert distill.name == "stage 2, distill"
    assert len(plan.parameters) == 3
    assert set(distill.memory[1]) == {
        *("weights (fp32)", "gradients (fp32)", "optimizer state (adamw, fp32)", "frozen teacher"),
        *("activations", "activations, recomputed"),
    }
    both = dry_run(small(teacher, "distill.ema_decay=0")).stages[1].memory[1]
    assert both["activations"] > 2 * distill.memory[1]["activations"]  # a second pass, and the teacher's


def kept_bytes(forward, weights) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward of `forward`, weights left out."""
    weights = {w.untyped_storage().data_ptr() for w in weights}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t  # alive, so that no address is used twice
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def block_bytes(side: int, text: int, precision: Precision, frozen: bool) -> float:
    """What one block keeps for one picture of side² cells: the difference of two depths."""
    bf16 = precision is Precision.bf16
    kept, batch = {}, 2
    for depth in (1, 2):
        config = transformer_config("tiny", qk_norm=True, guidance_embeds=True) | {"num_layers": depth}
        network = SanaTransformer2DModel(**config).requires_grad_(not frozen)
        if frozen and bf16:
            network = network.to(torch.bfloat16)
        x = torch.randn(batch, 8, side, side, dtype=network.dtype, requires_grad=True)
        y, one = torch.randn(batch, text, 128, dtype=network.dtype), torch.ones(batch, dtype=network.dtype)

        def forward(network=network, x=x, y=y, one=one):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not frozen):
                network(x, y, one, guidance=one, encoder_attention_mask=torch.ones(batch, text))

        kept[depth] = kept_bytes(forward, network.parameters())
    return (kept[2] - kept[1]) / batch


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("frozen", [False, True])
def test_bytes_of_a_block_are_as_measured(precision, frozen):
    saved, width = SAVED[precision], 128
    small, long, wide = (block_bytes(s, t, precision, frozen) for s, t in ((8, 16), (8, 80), (16, 16)))
    per_token, per_text_token = (wide - small) / 192 / width, (long - small) / 64 / width
    assert (saved.frozen_block if frozen else saved.block) == pytest.approx(per_token, rel=0.03)
    assert (saved.frozen_block_text if frozen else saved.block_text) == pytest.approx(per_text_token, rel=0.1)


@pytest.mark.parametrize("precision", Precision)
def test_bytes_of_a_head_are_as_measured(precision):
    heads, kept = DiscriminatorHeads(128, 1), {}
    for tokens in (64, 256):
        x = torch.randn(4, tokens, 128, requires_grad=True)
        with heads.frozen(), torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
            kept[tokens] = kept_bytes(lambda x=x: heads([x]), heads.parameters())
    per_token = (kept[256] - kept[64]) / 4 / 192 / 128
    assert SAVED[precision].head == pytest.approx(per_token, rel=0.03)


# ---- refusals and the page --------------------------------------------------------------------------


def test_refusals(teacher, tmp_path):
    def refusal(recipe: Recipe) -> str:
        with pytest.raises(SprintError) as error:
            dry_run(recipe)
        assert "\n" not in str(error.value)
        return str(error.value)

    nowhere = small("some/where")
    assert refusal(nowhere) == (
        "some/where: not on disk; for a dry run without it, set arch=0.6b (or 1.6b, 4.8b)"
    )
    assert refusal(small("some/where", "arch=0.7b")).startswith("no size named '0.7b'; choose one of ")
    assert refusal(small(teacher, "arch=0.6b")) == (f"arch = 0.6b has num_layers = 28, but {teacher} has 4")
    assert refusal(small(teacher, "distill.adversarial.taps=[1, 6]")) == (
        "distill.adversarial.taps = [1, 6], but the teacher's blocks are 0 to 3"
    )
    large = load_recipe(RECIPES / "0.6b.yaml", ["data.size=1000"])
    assert refusal(large) == "data.size = 1000, but it must be a multiple of 32"
    assert "no model in folder" in refusal(small(tmp_path))
    student = transformer_config("tiny", qk_norm=True, guidance_embeds=True)
    SanaTransformer2DModel(**student).save_pretrained(tmp_path / "student")
    assert "is a student" in refusal(small(tmp_path / "student"))


def test_the_page_has_recipe_counts_and_an_aligned_table(teacher):
    page = str(dry_run(small(teacher, "distill.batch_size=48")))
    assert f"teacher: {teacher}" in page
    lines = page.splitlines()
    assert "# stage 2, distill: GiB on each GPU" in lines
    start = lines.index("# stage 2, distill: GiB on each GPU")
    table = lines[start + 1 : lines.index("", start)]
    assert table[0].split() == ["GPUs", "1", "8", "32"]
    assert table[1].split() == ["pictures", "on", "each", "48", "6", "2"]
    assert len({len(line) for line in table}) == 1
    assert "Activations: an estimate" in page
