"""Every family of teachers, by the same tests. A new one is a folder in sprint/models/ and a row of `CASES`.

The toy in `tests/models/toy` is here to prove the seam: it is as unlike Sana as a small family can be.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sprint.base.errors import SprintError
from sprint.data.batch import Batch
from sprint.engine.compiled import prepare_blocks
from sprint.maths.dual import value_and_tangent
from sprint.maths.trigflow import HALF_PI, flow_time, to_flow_input, to_flow_velocity
from sprint.models import families
from sprint.models.families import FAMILIES, family_of, load_family
from sprint.models.sana.family import Sana
from sprint.models.sana.presets import transformer_config
from sprint.models.student import from_adapted
from sprint.models.taps import TappedTeacher
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME, Teacher
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import Data, Evaluate, Recipe
from sprint.sample.generate import StudentGenerator, TeacherGenerator
from sprint.sample.load import load_generator
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage
from sprint.train.plan.networks import build_networks
from sprint.train.plan.plan import dry_run
from sprint.train.run import distill
from sprint.train.start import calibrated
from sprint.weights.checkpoint import understand
from sprint.weights.convert import convert, describe
from sprint.weights.export import export_student, export_teacher, load_student
from sprint.weights.load import build_network
from tests.models.toy.encoders import ToyEncoders, ToyPixels, ToyText, ToyTokenizer
from tests.models.toy.family import Toy
from tests.models.toy.presets import BASE
from tests.tiny import tiny_recipe
from tests.tolerance import assert_close, of_network
from tools.bench.flops import Counts

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "families.txt"
BATCH, TOKENS, UPDATES = 8, 5, 20


class Case(NamedTuple):
    """A family, the config of a small base teacher, and the encoders that fit it."""

    family: Teacher
    config: dict
    encoders: object

    @property
    def latent(self) -> tuple[int, int, int]:
        sizes = self.family.sizes(self.config)
        return sizes.channels, sizes.side, sizes.side

    def network(self, seed: int = 0, adapted: bool = False, student: bool = False) -> ModelMixin:
        """No two weights are equal, so nothing that should matter is zero."""
        torch.manual_seed(seed)
        config = self.family.adapted_config(self.config) if adapted or student else self.config
        network = self.family.network_class(**(self.family.student_config(config) if student else config))
        for name, p in network.named_parameters():
            p.data = 0.15 * torch.randn_like(p) + ("norm" in name and p.ndim == 1)
        return network.eval()

    def batch(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        """Random latents; every other prompt is two tokens short."""
        generator = torch.Generator().manual_seed(1000 + seed)
        text_width = self.family.sizes(self.config).text_width
        mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
        mask[::2, -2:] = 0
        return Batch(
            torch.randn(BATCH, *self.latent, generator=generator, dtype=dtype),
            torch.randn(BATCH, TOKENS, text_width, generator=generator, dtype=dtype),
            mask,
        )

    def null(self) -> tuple[Tensor, Tensor]:
        batch = self.batch(seed=999)
        return batch.text[:1], torch.tensor([[1, 0, 0, 0, 0]])


def sana() -> Case:
    narrow = {"num_layers": 2, "num_attention_heads": 1, "num_cross_attention_heads": 2}
    narrow |= {"cross_attention_head_dim": 16, "cross_attention_dim": 32}
    return Case(Sana(), transformer_config("tiny") | narrow, load_family("tiny", 16, instruction=False))


def toy() -> Case:
    torch.manual_seed(0)
    parts = ToyTokenizer(), ToyText(BASE["words"]), ToyPixels(cell=8)
    return Case(Toy(), dict(BASE), ToyEncoders(*parts, max_length=16, instruction=False))


CASES = {"sana": sana, "toy": toy}


@pytest.fixture(autouse=True)
def with_the_toy(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, Toy()))


@pytest.fixture(params=CASES)
def case(request, with_the_toy) -> Case:
    return CASES[request.param]()


def times(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(0.05, HALF_PI - 0.05, BATCH, dtype=dtype)


GUIDANCE = torch.linspace(4.0, 5.0, BATCH)


def test_every_family_has_a_row():
    assert {type(CASES[name]().family) for name in CASES} >= {type(family) for family in FAMILIES}


# ---- names and folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("student", [False, True], ids=["teacher", "student"])
def test_flops_are_those_of_a_real_forward_pass(case, student):
    """Counted on the meta device by torch's formulas, and on real numbers by the benchmark's."""
    network, side = case.network(student=student), case.latent[-1]
    x, t = torch.randn(1, *case.latent), torch.full((1,), 0.5)
    text, mask = torch.randn(1, TOKENS, case.family.sizes(network.config).text_width), torch.ones(1, TOKENS)
    with torch.no_grad(), Counts() as counts:
        case.family.velocity(network, x, t, text, mask, t if student else None, DENSE_TIME)
    counted = sum(each.flops for operations in counts.operations.values() for each in operations)
    assert case.family.forward_flops(network.config, side, TOKENS) == counted > 0
    depth = case.family.sizes(network.config).depth
    half = case.family.forward_flops(network.config, side, TOKENS, blocks=depth // 2)
    assert depth // 2 / depth * counted < half < counted  # the two ends are there whatever the depth


@pytest.mark.parametrize("student", [False, True], ids=["teacher", "student"])
def test_convert_to_both_layouts_and_back(case, student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = case.network(student=student)
    network.save_pretrained("start")
    scale = DENSE_TIME if student else SPARSE_TIME
    there = convert("start", "there", "original", time_scale=scale, progress=False)
    original = understand("there")  # by its tensors' names alone
    assert (original.family.title, original.layout) == (case.family.title, "original")
    assert original.is_student == student and original.time_scale == scale
    back = convert("there", "back", "trigflow", verify="full", progress=False)
    assert back["certificate"]["ways_back"].keys() == {"flow", "original"}
    assert f"{case.family.title} " in describe(back) and "heads: " in describe(back)
    again = build_network(understand("back"))
    weights, expected = again.state_dict(), network.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert type(again) is type(network) and there["network"]["guidance"] == student


def test_a_foreign_network_is_of_no_family(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SprintError, match="UNet2DConditionModel, which is not a Sana or Toy transformer"):
        understand(tmp_path)
    with pytest.raises(TypeError, match="Linear is a network of no family"):
        family_of(torch.nn.Linear(1, 1))


def test_export_load_and_sample(case, tmp_path):
    student = case.network(student=True)
    logvar = torch.nn.Linear(case.family.sizes(case.config).width, 1)
    folder = export_student(tmp_path / "student", student, logvar, case.encoders, {"recipe": "r"})
    teacher = export_teacher(tmp_path / "teacher", case.network(adapted=True), case.encoders, {})
    loaded, head = load_student(folder)
    assert torch.equal(head.weight, logvar.weight)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))
    with pytest.raises(
        SprintError, match=r"is a teacher \(it embeds no guidance\); a student is needed here"
    ):
        load_student(teacher)
    for place, kind in ((folder, StudentGenerator), (teacher, TeacherGenerator)):
        generator = load_generator(str(place))
        assert type(generator) is kind and type(generator.family) is type(case.encoders)
        assert generator.view.time_scale == DENSE_TIME
        pictures = generator.pictures(["a red circle", "a blue square"], [0, 1], 2)
        alone = generator.pictures(["a blue square"], [1], 2)
        assert pictures.shape == (2, 64, 64, 3) and pictures.std() > 1
        assert abs(pictures[1].astype(int) - alone[0]).max() <= 1  # a picture is its prompt's and its seed's
    assert case.family.teacher_usage() in (teacher / "README.md").read_text()
    (teacher / "transformer" / "trigflow.json").unlink()  # then its own pipeline's word counts
    assert understand(teacher).time_scale == DENSE_TIME


# ---- the network ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_flow_velocity_comes_back_from_the_view(case, true_float64):
    network = case.network(student=True).double()
    view = TrigFlowView(network, SPARSE_TIME)
    x_hat, text, mask = case.batch(dtype=torch.float64)
    t, guidance = times(torch.float64), GUIDANCE.double()
    t_fm = flow_time(t)
    x_fm = to_flow_input(x_hat, t_fm)
    F = view(x_hat, t, text, mask, guidance)
    v = case.family.velocity(network, x_fm, t_fm, text, mask, guidance, SPARSE_TIME)
    assert_close(to_flow_velocity(F, x_fm, t_fm), v, of_network(network))
    assert (F - v).norm() > 0.1 * v.norm()
    assert (view(x_hat, t, text, mask, guidance + 1) - F).norm() > 1e-6 * F.norm()
    padded = torch.where(mask[..., None] == 0, text + 10, text)
    assert_close(view(x_hat, t, padded, mask, guidance), F, of_network(network))


def test_a_tangent_is_that_of_torch_func(case, true_float64):
    view = TrigFlowView(case.network(student=True).double(), DENSE_TIME)
    x_hat, text, mask = case.batch(dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    directions = (
        torch.randn(x_hat.shape, generator=generator, dtype=torch.float64),
        torch.randn(BATCH, generator=generator, dtype=torch.float64),
    )

    def F(x_hat, t):
        return view(x_hat, t, text, mask, GUIDANCE.double())

    value, tangent = value_and_tangent(F, x_hat, times(torch.float64), *directions)
    with sdpa_kernel(SDPBackend.MATH):  # the one that has a forward derivative
        expected = torch.func.jvp(F, (x_hat, times(torch.float64)), directions)
    for ours, theirs in zip((value, tangent), expected, strict=True):
        assert_close(ours, theirs, of_network(view.network, passes=2))


@torch.no_grad()
def test_taps_are_the_blocks_own_tokens(case):
    view = TrigFlowView(case.network(adapted=True), DENSE_TIME)
    family, network, batch = case.family, view.network, case.batch()
    seen = []
    handles = [
        block.register_forward_hook(lambda block, args, out: seen.append(family.tokens(out)))
        for block in family.blocks(network)
    ]
    plain = view(batch.latent, times(), batch.text, batch.mask)
    for handle in handles:
        handle.remove()
    sizes = family.sizes(network.config)
    assert len(seen) == sizes.depth
    for tap, expected in enumerate(seen):
        (features,) = TappedTeacher(view, (tap,))(batch.latent, times(), batch.text, batch.mask)
        assert features.shape == (BATCH, (sizes.side // sizes.patch) ** 2, sizes.width)
        assert torch.equal(features, expected)
    assert torch.equal(view(batch.latent, times(), batch.text, batch.mask), plain)
    with pytest.raises(SprintError, match=f"the teacher's blocks are 0 to {sizes.depth - 1}"):
        TappedTeacher(view, (sizes.depth,))


@torch.no_grad()
def test_a_text_is_read_once_and_says_the_same(case):
    view = TrigFlowView(case.network(adapted=True), DENSE_TIME)
    batch = case.batch()
    plain = view(batch.latent, times(), batch.text, batch.mask)
    with case.family.text_memory(view.network).of(batch.text):
        for _ in range(2):
            again = view(batch.latent, times(), batch.text, batch.mask)
            assert_close(again, plain, of_network(view.network))


@torch.no_grad()
def test_a_student_begins_as_its_adapted_teacher(case):
    adapted, batch = case.network(adapted=True), case.batch()
    student = from_adapted(adapted)
    assert case.family.is_student(student.config) and not case.family.is_student(adapted.config)
    F = TrigFlowView(student, DENSE_TIME)(batch.latent, times(), batch.text, batch.mask, GUIDANCE)
    expected = TrigFlowView(adapted, DENSE_TIME)(batch.latent, times(), batch.text, batch.mask)
    assert_close(F, expected, of_network(student))


@pytest.mark.slow
def test_the_calibrated_start_measures_every_norm(case):
    teacher, batch = case.network(), case.batch()
    adapted = calibrated(teacher, [(batch.latent, flow_time(times()), batch)], SPARSE_TIME)
    norms = [each.norm for each in case.family.qk(teacher)]
    assert set(adapted.state_dict()) - set(teacher.state_dict()) == set(norms)
    for norm in map(adapted.get_parameter, norms):
        assert len(norm.unique()) == 1 and norm[0] != 1
    mlp, features = case.family.time_mlp(teacher)
    fitted, _ = case.family.time_mlp(adapted)
    assert not torch.equal(fitted(features(torch.ones(1))), mlp(features(torch.ones(1))))


# ---- engine and training --------------------------------------------------------------------------------


def test_in_bf16_the_clock_stays_exact(case, bf16_engine):
    network = bf16_engine.frozen(case.network(adapted=True))
    clock = {id(p) for p in case.family.time_embedder(network).parameters()}
    assert clock
    for p in network.parameters():
        assert p.dtype is (torch.float32 if id(p) in clock else torch.bfloat16)
    batch = case.batch()
    view = TrigFlowView(network, DENSE_TIME)
    with torch.no_grad(), bf16_engine.autocast():
        F = [
            view(batch.latent, t.expand(BATCH), batch.text, batch.mask)
            for t in torch.tensor([0.7853, 0.7864])
        ]
    # flow times of 0.49995 and 0.5005, which bf16 cannot tell apart
    assert F[0].isfinite().all() and not torch.equal(*F)


@pytest.mark.parametrize("compiled", [False, True], ids=["recomputed", "compiled"])
def test_blocks_recomputed_or_compiled_give_the_same(case, compiled, monkeypatch):
    """Traced, that is: Inductor takes minutes, and `tests/engine/test_compiled.py` has it."""
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)
    batch, results = case.batch(), []
    for change in (False, True):
        view = TrigFlowView(case.network(student=True).train(), DENSE_TIME)
        if change:
            prepare_blocks(view.network, compiled, recompute=not compiled)

        def F(x_hat, t, view=view):
            return view(x_hat, t, batch.text, batch.mask, GUIDANCE)

        value, tangent = value_and_tangent(F, batch.latent, times(), batch.latent, torch.ones(BATCH))
        value.square().mean().backward()
        results.append([value.detach(), tangent, *(p.grad for p in view.network.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, of_network(view.network, passes=4))


def first_losses(case: Case, engine) -> list[tuple[str, float, float]]:
    """The first losses of both stages, on networks and batches made from seeds.  -> update, loss, promise"""
    recipe, found = tiny_recipe(), []
    recipe = replace(
        recipe, adapt=replace(recipe.adapt, steps=UPDATES), distill=replace(recipe.distill, steps=UPDATES)
    )
    stages = (
        AdaptStage(recipe, engine, case.network(adapted=True), case.null()),
        DistillStage(recipe, engine, case.network(adapted=True), case.null(), case.latent),
    )
    update = of_network(case.network(), passes=4)  # forward, tangent, and backward twice
    for stage in stages:
        for step in range(UPDATES):
            loss = stage.update(step, case.batch(seed=step)).read(engine)["loss"]
            promise = (step + 1) * update * max(1.0, abs(loss))  # each update adds what its passes err
            name = f"{case.family.title.lower()} {stage.name} {step + 1} {stage.phase(step)}"
            found.append((name, loss, promise))
    return found


@pytest.mark.slow
def test_twenty_golden_updates(case, engine):
    """A change that should not alter numerics shows the same losses, as far as the file promises their digits.

    Where it should, or for a new family, write the file and look at the difference:
        UPDATE_GOLDEN=1 pytest tests/models/test_families.py -k golden
    """
    ours, title = first_losses(case, engine), case.family.title.lower()
    lines = GOLDEN.read_text().splitlines()
    if os.environ.get("UPDATE_GOLDEN"):
        others = [line for line in lines if line.split()[0] != title]
        lines = [*others, *(f"{update} {loss:.6f} ± {promise:.6f}" for update, loss, promise in ours)]
        GOLDEN.write_text("\n".join(lines) + "\n")
    golden = [line.rsplit(maxsplit=3) for line in lines if line.split()[0] == title]
    assert [update for update, *_ in ours] == [update for update, *_ in golden]
    for (update, loss, promise), (_, expected, _, promised) in zip(ours, golden, strict=True):
        # the file's own is the helper's
        assert float(promised) == pytest.approx(promise, rel=0.1, abs=1e-6), update
        assert loss == pytest.approx(float(expected), rel=0, abs=float(promised)), update


def recipe_of(case: Case, tmp_path: Path) -> Recipe:
    """Three updates of stage 1 and four of stage 2 on scenes, with the teacher's folder in place."""
    folder = tmp_path / "given"
    case.family.teacher_pipeline(case.encoders, case.network()).save_pretrained(folder)
    recipe = tiny_recipe()
    return replace(
        recipe,
        name="run",
        teacher=str(folder),
        data=Data(size=64),
        text=replace(recipe.text, max_length=16),
        adapt=replace(recipe.adapt, steps=3),
        distill=replace(recipe.distill, steps=4),
        evaluate=Evaluate(prompts=0),
    )


def test_the_plan_counts_what_is_trained(case, tmp_path):
    recipe = recipe_of(case, tmp_path)
    plan, networks = dry_run(recipe), build_networks(recipe)
    teacher, adapted, student, heads = plan.parameters.values()
    assert teacher == sum(p.numel() for p in case.network().parameters())
    assert adapted == sum(p.numel() for p in case.network(adapted=True).parameters())
    width = case.family.sizes(case.config).width
    assert student == sum(p.numel() for p in case.network(student=True).parameters()) + width + 1
    assert heads == sum(p.numel() for p in networks.heads.parameters())
    sharded = dry_run(replace(recipe, engine="fsdp2", shard_teacher=True))
    assert all(
        total > 0 for stage in sharded.stages for parts in stage.memory.values() for total in parts.values()
    )


@pytest.mark.slow
def test_a_whole_run(case, tmp_path, monkeypatch):
    """Teacher in, student out, page written: what `sprint distill` does."""
    recipe = recipe_of(case, tmp_path)
    distill(recipe, tmp_path / "runs", "sprint distill run")
    run = tmp_path / "runs" / "run"
    checkpoint = understand(run / "student")
    assert checkpoint.is_student and checkpoint.family.title == case.family.title
    generator = load_generator(str(run / "student"))
    assert generator.pictures(["a red circle"], [0], 1).shape == (1, 64, 64, 3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows) and (run / "report.html").exists()


# ---- the seam -------------------------------------------------------------------------------------------


def test_no_other_room_knows_sana_by_name():
    """Its classes and the names inside of its network are known to its own folder alone."""
    names = re.compile(
        r"\b(SanaTransformer2DModel|SanaPipeline|SanaSprintPipeline|transformer_blocks|attn[12]|time_embed"
        r"|guidance_embeds|caption_channels|num_attention_heads|num_layers)\b"
    )
    home = ROOT / "sprint" / "models" / "sana"
    told = {
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in (ROOT / "sprint").rglob("*.py")
        if home not in file.parents
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if names.search(line)
    }
    assert told == set()


def test_every_family_has_the_same_files():
    sana, toy = ROOT / "sprint" / "models" / "sana", ROOT / "tests" / "models" / "toy"
    assert {file.name for file in sana.glob("*.py")} == {file.name for file in toy.glob("*.py")}
