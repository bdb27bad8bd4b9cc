import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import SanaTransformer2DModel
from safetensors.torch import save_file

from sprint.base.errors import SprintError
from sprint.engine.optim import build_optimizer
from sprint.models.discriminator import DiscriminatorHeads
from sprint.models.sana.costs import FOOTPRINTS
from sprint.models.sana.presets import transformer_config
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Optimizer, OptimizerKind, Precision, Recipe
from sprint.train.plan.engines import optimizer_state_numel
from sprint.train.plan.page import page
from sprint.train.plan.plan import dry_run
from tools.bench import memory as bench_memory
from tools.bench.measure import SIZES, Request

RECIPES = Path(__file__).parents[3] / "recipes"
COUNTS = {  # teacher, with QK-norm, student
    "0.6b": (591_747_872, 591_876_896, 593_502_369),
    "1.6b": (1_604_462_752, 1_604_641_952, 1_610_239_713),
    "4.8b": (4_721_288_352, 4_721_825_952, 4_727_423_713),
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
@pytest.mark.slow
def test_parameter_counts_equal_the_published_networks(name):
    plan = dry_run(load_recipe(RECIPES / f"{name}.yaml"))
    *networks, heads = plan.parameters.values()
    assert tuple(networks) == COUNTS[name]
    assert heads / 4 == pytest.approx({"0.6b": 13.28e6, "1.6b": 50.19e6, "4.8b": 50.19e6}[name], rel=1e-3)
    for count in networks:
        assert f"{count:,}" in "\n".join(page(plan))


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


@pytest.mark.slow
def test_stage_two_of_the_16b_by_hand():
    (_, distill) = dry_run(
        load_recipe(RECIPES / "1.6b.yaml", ["distill.ema_decay=0.99", "micro_batch_size=0"])
    ).stages
    student, frozen, time = 1_610_239_713, 1_604_641_952, 2240 * (256 + 1 + 2240 + 1 + 6 * 2240 + 6)
    parts = distill.memory[32]
    assert parts["weights (fp32)"] == parts["gradients (fp32)"] == parts["EMA (fp32)"] == 4 * student
    assert parts["optimizer state (came, fp32)"] == pytest.approx(4 * student, rel=0.01)
    assert (parts["bf16 copies"], parts["frozen teacher"]) == (2 * student, 2 * frozen + 2 * time)
    picture = 1024 * 2240  # numbers of the size of one
    student_pass = 20 * (124.5 * picture + 18 * 300 * 2240) + 2.5 * picture + 16 * 300 * 2240
    # prompts, projected, and keys and values of 20 blocks
    text = 2 * (2 * 300 * 2304 + (2 + 2 * 20) * 300 * 2240)
    frozen_pass = 20 * 85 * picture + 2 * picture
    heads = 2 * 4 * 14 * picture  # real and fake, four taps, with features in fp32
    assert parts["activations"] == 16 * (student_pass + text + frozen_pass + heads)  # 512 over 32 GPUs
    kept = 20 * 4 * picture + 2.5 * picture + 16 * 300 * 2240
    frozen_kept = 20 * 4 * picture + 2 * picture
    assert parts["activations, recomputed"] == 16 * (kept + text + frozen_kept + heads)
    assert distill.memory[8]["activations"] == 4 * parts["activations"]
    _, capped = dry_run(load_recipe(RECIPES / "1.6b.yaml")).stages  # 16 in one forward, however many GPUs
    assert capped.memory[8]["activations"] == capped.memory[32]["activations"] == parts["activations"]
    assert distill.memory[8]["frozen teacher"] == parts["frozen teacher"]  # nothing is sharded


def test_what_is_switched_off_takes_no_memory(teacher):
    off = ("distill.adversarial.weight=0", "distill.self_consistency=0", "distill.ema_decay=0")
    plan = dry_run(small(teacher, "adapt.steps=0", *off))
    (distill,) = plan.stages
    assert distill.name == "stage 2, distill"
    assert len(plan.parameters) == 3
    assert set(distill.memory[1]) == {
        *("weights (fp32)", "gradients (fp32)", "optimizer state (adamw, fp32)", "frozen teacher"),
        *("texts and latents", "activations", "activations, recomputed"),
    }
    both = dry_run(small(teacher, "distill.ema_decay=0")).stages[1].memory[1]
    alone = distill.memory[1]["activations"]  # the graphs of the two losses are never there together
    assert 1.5 * alone < both["activations"] < 2.5 * alone


# ---- against what is measured ------------------------------------------------------------------------


def test_live_bytes_of_known_tensors():
    with bench_memory.LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[:10]
        with live.part("second"):
            b = a + 1
            del b
        assert (live.now, live.peak, live.by_part) == (4000, 8000, {"other": 4000, "second": 8000})
        del a
        assert live.now == 4000  # the view holds it
        del view
        assert live.now == 0 and live.peak == 8000
        weight = torch.zeros(5, requires_grad=True)
        loss = (weight.exp() * 2).sum()
        assert live.now == 20 + 20 + 4  # exp is kept for the backward, twice exp is not
        loss.backward()
        del loss
    assert live.now == 40 and weight.grad is not None


def memory_case(stage: str, precision: Precision, checkpointing: bool, micro_batch: int = 0, depth: int = 0):
    return bench_memory.Case(Request("tiny", 8, "cpu", precision), stage, checkpointing, micro_batch, depth)


@pytest.fixture
def case_on_cpu(monkeypatch):
    """`build` resets accelerate and sends it to the CPU; nothing of that outlives the test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield memory_case
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", Precision)
def test_the_plan_is_within_a_tenth_of_real_updates(case_on_cpu, precision, checkpointing):
    for stage in bench_memory.STAGES:
        row = bench_memory.row(case_on_cpu(stage, precision, checkpointing))
        assert row["how"] == "counted"
        assert row["planned_bytes"] == pytest.approx(row["peak_bytes"], rel=0.1), stage


def test_the_plan_is_within_a_tenth_where_gradients_accumulate(case_on_cpu):
    row = bench_memory.row(case_on_cpu("distill", Precision.bf16, True, micro_batch=4))
    assert row["planned_bytes"] == pytest.approx(row["peak_bytes"], rel=0.1)


@pytest.mark.parametrize(("precision", "checkpointing"), [(Precision.fp32, False), (Precision.bf16, True)])
def test_the_plan_is_within_a_tenth_for_a_student_deeper_than_its_teacher(
    case_on_cpu, precision, checkpointing
):
    deep, shallow = (memory_case("distill", precision, checkpointing, depth=depth) for depth in (8, 0))
    row = bench_memory.row(deep)
    assert row["planned_bytes"] == pytest.approx(row["peak_bytes"], rel=0.1)
    assert bench_memory.planned(shallow) < 0.8 * row["peak_bytes"]


def test_tensors_without_memory_give_the_same_count(case_on_cpu, monkeypatch):
    tiny = SIZES["tiny"]
    monkeypatch.setitem(SIZES, "one block", replace(tiny, config=tiny.config | {"num_layers": 1}, taps=(0,)))
    case = case_on_cpu("distill", Precision.bf16, True)
    case = case._replace(request=case.request._replace(network="one block"), depth=2)
    real, traced = (bench_memory.counted(case, traced) for traced in (False, True))
    for update in ("G", "D"):
        assert traced[update]["peak"] == pytest.approx(real[update]["peak"], rel=1e-3)


def blocks_keep(precision: Precision, side: int) -> float:
    """Bytes that a pass of the trained network keeps of one block, weights' copies and all, for one picture."""
    kept, batch = [], 2
    for depth in (1, 2):
        config = transformer_config("tiny", qk_norm=True) | {"num_layers": depth}
        network = SanaTransformer2DModel(**config)
        x, y, one = torch.randn(batch, 8, side, side), torch.randn(batch, 16, 128), torch.ones(batch)
        with bench_memory.LiveBytes() as live:
            for p in network.parameters():
                live.note(p)
            before = live.now
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
                out = network(x, y, one, encoder_attention_mask=torch.ones(batch, 16)).sample
            kept.append(live.now - before)
        assert out.requires_grad
    return (kept[1] - kept[0]) / batch


@pytest.mark.parametrize("precision", Precision)
def test_bytes_of_a_block_are_as_measured(precision):
    per_token = (blocks_keep(precision, 16) - blocks_keep(precision, 8)) / 192 / 128
    assert FOOTPRINTS[precision].block == pytest.approx(per_token, rel=0.01)


@pytest.mark.parametrize("precision", Precision)
def test_bytes_of_a_head_are_as_measured(precision):
    """Features count where they are kept as they are: in fp32."""
    kept = {}
    for tokens in (64, 256):
        heads = DiscriminatorHeads(128, 1)
        with bench_memory.LiveBytes() as live:
            x = torch.randn(4, tokens, 128, requires_grad=True)
            for tensor in (*heads.parameters(), *heads.buffers()):
                live.note(tensor)
            before = live.now
            with heads.frozen(), torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
                logits = heads([x], virtual_batch=4)
            kept[tokens] = live.now - before
        assert logits.requires_grad
    per_token = (kept[256] - kept[64]) / 4 / 192 / 128
    features = 4 if precision is Precision.fp32 else 0
    assert FOOTPRINTS[precision].head == pytest.approx(per_token + features, rel=0.01)


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
    said = "\n".join(page(dry_run(small(teacher, "distill.batch_size=48"))))
    assert f"teacher: {teacher}" in said
    lines = said.splitlines()
    start = lines.index("# stage 2, distill, engine single: GiB on each GPU")
    table = lines[start + 1 : lines.index("", start)]
    assert table[0].split() == ["GPUs", "1"]
    assert table[1].split() == ["pictures", "on", "each", "48"]
    assert len({len(line) for line in table}) == 1
    assert "width x (177 bytes x image tokens + 16 bytes x text tokens)" in said
