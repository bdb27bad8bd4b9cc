"""A network grown of another one's blocks, and the student that trains it, in every family."""

import copy

import pytest
import torch
from diffusers import SanaSprintPipeline, SanaTransformer2DModel

from sprint.base.errors import SprintError
from sprint.doctor.recipe import _teacher
from sprint.doctor.run import examine_run
from sprint.evaluate.metrics.registry import PACE
from sprint.evaluate.models import STUDENT, TEACHER
from sprint.evaluate.result import Column, Figure, Measured, Result
from sprint.maths.dual import value_and_tangent
from sprint.models import families
from sprint.models.depth import depth_words, grown, with_blocks
from sprint.models.families import FAMILIES
from sprint.models.student import Student, TrainedStudent
from sprint.sample.load import load_generator
from sprint.train.distill import DistillStage
from sprint.train.plan.networks import build_networks
from sprint.train.plan.plan import dry_run
from sprint.train.report.verdict import key_figures
from sprint.train.run import distill
from sprint.weights.checkpoint import understand
from sprint.weights.export import export_student, load_student
from tests.models.test_families import CASES, GUIDANCE, Case, recipe_of, times
from tests.models.toy.family import Toy
from tests.tiny import same, snapshot, tiny_recipe
from tests.train.test_adapt import load

DEEP = 5  # of the cases, which have 2 blocks: 0, 1, then copies of 0, 1, 0


@pytest.fixture(params=CASES)
def case(request, monkeypatch) -> Case:
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, Toy()))
    return CASES[request.param]()


def blocks_of(case: Case, network) -> list[dict]:
    return [snapshot(block) for block in case.family.blocks(network)]


def test_new_blocks_are_copies_with_their_output_projections_at_zero(case):
    network = case.network(student=True).train()
    old, own = blocks_of(case, network), case.family.sizes(network.config).depth
    state = torch.get_rng_state()
    larger = grown(network, DEEP)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(larger) is type(network) and larger.training
    expected = case.family.with_depth(network.config, DEEP)
    assert all(larger.config[key] == value for key, value in expected.items() if not key.startswith("_"))
    assert case.family.sizes(larger.config).depth == DEEP == len(case.family.blocks(larger))
    for place, (block, weights) in enumerate(
        zip(case.family.blocks(larger), blocks_of(case, larger), strict=True)
    ):
        ends = {*case.family.output_projections(block)} if place >= own else set()
        assert ends <= weights.keys() and bool(ends) == (place >= own)
        for name, weight in weights.items():
            copied = old[place % own][name]
            assert torch.equal(weight, torch.zeros_like(copied) if name in ends else copied)
    assert blocks_of(case, network)[0].keys() == old[0].keys()
    for before, after in zip(old, blocks_of(case, network), strict=True):
        assert same(before, after)
    assert {p.data_ptr() for p in larger.parameters()} >= {p.data_ptr() for p in network.parameters()}
    assert len({p.data_ptr() for p in larger.parameters()}) == len([*larger.parameters()])


def test_a_deeper_student_begins_as_its_teacher_bit_for_bit(case):
    """Value, tangent and log-variance, with a guidance embedder that is at work."""
    network = case.network(student=True)
    trained = [TrainedStudent(Student(each)) for each in (network, grown(network, DEEP))]
    for each in trained:
        torch.manual_seed(3)
        torch.nn.init.normal_(each.student.logvar.weight)
    x_hat, text, mask = case.batch()
    generator = torch.Generator().manual_seed(5)
    towards = torch.randn(x_hat.shape, generator=generator), torch.randn(len(x_hat), generator=generator)

    def seen(student: TrainedStudent, guidance=GUIDANCE):
        logvar = []

        def F(x, t):
            out, log_variance = student(x, t, text, mask, guidance)
            logvar.append(log_variance)
            return out

        return [*value_and_tangent(F, x_hat, times(), *towards), logvar[0]]

    shallow, deep = (seen(each) for each in trained)
    for a, b in zip(shallow, deep, strict=True):
        assert torch.equal(a, b) and a.norm() > 0
    assert not torch.equal(shallow[0], seen(trained[0], GUIDANCE + 1)[0])
    block = case.family.blocks(trained[1].student.network)[DEEP - 1]
    torch.nn.init.normal_(block.get_parameter(case.family.output_projections(block)[0]), std=0.1)
    for a, b in zip(shallow[:2], seen(trained[1])[:2], strict=True):
        assert not torch.equal(a, b)  # that the test can fail


def test_new_blocks_learn_by_their_output_projections_first_and_whole_from_the_second_update(case):
    network = grown(case.network(student=True), DEEP)
    batch = case.batch()
    target = torch.randn(batch.latent.shape, generator=torch.Generator().manual_seed(7))
    optimizer = torch.optim.SGD(network.parameters(), 1e-2)
    student = Student(network)
    for update in range(2):
        optimizer.zero_grad()
        F = student(batch.latent, times(), batch.text, batch.mask, GUIDANCE)
        (F - target).square().mean().backward()
        for block in list(case.family.blocks(network))[2:]:
            ends = {*case.family.output_projections(block)}
            weights = {name for name, p in block.named_parameters() if p.ndim > 1}
            moved = {name for name, p in block.named_parameters() if p.grad.norm() > 0}
            assert all(p.grad is not None for p in block.parameters())
            assert moved == ends if update == 0 else moved >= weights
        optimizer.step()


def test_a_network_of_some_of_the_blocks(case):
    """What pruning asks for."""
    network = case.network(student=True)
    first, second = blocks_of(case, network)
    for order, expected in (([1], [second]), ([1, 1, 0], [second, second, first])):
        found = blocks_of(case, with_blocks(network, order))
        assert len(found) == len(expected) and all(map(same, found, expected))


def test_as_deep_as_the_teacher_is_the_network_itself_and_shallower_is_refused(case):
    network = case.network(student=True)
    assert grown(network, 0) is network and grown(network, 2) is network
    with pytest.raises(SprintError, match=r"distill\.depth = 1, but the teacher has 2 blocks: .* or more$"):
        grown(network, 1)
    assert depth_words(2, 2) == "" and depth_words(8, 4) == "8 blocks, its teacher 4"


def test_a_depth_that_was_the_classs_default_can_be_grown():
    """diffusers remembers which fields nobody gave, and makes those anew from its defaults."""
    names = ("num_attention_heads", "num_cross_attention_heads", "caption_channels", "sample_size")
    sizes = {"attention_head_dim": 8, "cross_attention_head_dim": 8, "cross_attention_dim": 8}
    network = SanaTransformer2DModel(4, 4, **dict.fromkeys(names, 1), **sizes)
    own = len(network.transformer_blocks)
    assert "num_layers" in network.config["_use_default_values"]
    assert len(grown(network, own + 1).transformer_blocks) == own + 1


# ---- in stage 2, on disk and in the plan ------------------------------------------------------------------


def deep_stage(case: Case, engine, depth: int = 4) -> DistillStage:
    recipe = tiny_recipe()
    recipe.distill.depth, recipe.distill.self_consistency = depth, 1.0
    return DistillStage(recipe, engine, case.network(adapted=True), case.null(), case.latent)


def test_a_stage_trains_every_block_of_a_deeper_student(case, engine):
    stage, shallow = deep_stage(case, engine), deep_stage(case, engine, depth=0)
    blocks = case.family.blocks(stage.student.network)
    assert len(blocks) == 4 and stage.teacher.sizes.depth == 2 and stage.tapped.taps == (0, 1)
    assert same(snapshot(stage.heads), snapshot(shallow.heads))
    before = [snapshot(block) for block in blocks]
    for step in range(4):
        stage.update(step, case.batch(seed=step))
    for block, was in zip(blocks, before, strict=True):
        assert all(not torch.equal(p, was[name]) for name, p in block.named_parameters() if p.ndim > 1)
    result = stage.result()
    assert case.family.sizes(result.network.config).depth == 4
    assert stage.ema.shadow.keys() == {f"student.{name}" for name, _ in result.named_parameters()}


def test_the_first_updates_loss_is_that_of_a_student_as_deep_as_its_teacher(case, engine):
    losses = []
    for depth in (0, 4):
        stage = deep_stage(case, engine, depth)
        losses.append(stage.update(0, case.batch()).read(engine)["loss"])
    assert losses[0] == losses[1]


def test_a_deeper_student_goes_round_its_folder(case, engine, tmp_path):
    stage = deep_stage(case, engine)
    for step in range(2):
        stage.update(step, case.batch(seed=step))
    student = stage.result()
    folder = export_student(
        tmp_path / "student", student.network, student.logvar, case.encoders, {"depth": depth_words(4, 2)}
    )
    network, logvar = load_student(folder)
    assert case.family.sizes(network.config) == case.family.sizes(student.network.config)
    assert case.family.sizes(network.config).depth == 4
    assert same(snapshot(network), snapshot(student.network)) and same(
        snapshot(logvar), snapshot(student.logvar)
    )
    assert "- Depth: 4 blocks, its teacher 2\n" in (folder / "README.md").read_text()


def test_the_plan_has_the_blocks_of_the_student(case, tmp_path):
    recipe = recipe_of(case, tmp_path)
    recipe.distill.depth = 7
    networks = build_networks(recipe)
    assert networks.sizes.depth == 2 and networks.student_depth == 7
    real = copy.deepcopy(grown(case.network(student=True), 7))
    shapes = {name: p.shape for name, p in networks.student["network"].named_parameters()}
    assert shapes == {name: p.shape for name, p in real.named_parameters()}
    recipe.distill.depth = 1
    with pytest.raises(SprintError, match=r"distill\.depth = 1, but the teacher has 2 blocks"):
        build_networks(recipe)


def test_a_deeper_students_state_goes_round_and_training_goes_on_bit_for_bit(case, engine):
    one, other = deep_stage(case, engine), deep_stage(case, engine)
    for step in range(3):
        one.update(step, case.batch(seed=step))
    assert not same(one.tensors(), other.tensors())
    load(other, one)
    for step in range(3, 6):
        for stage in (one, other):
            stage.update(step, case.batch(seed=step))
    assert same(one.tensors(), other.tensors()) and one.facts() == other.facts()
    with pytest.raises(KeyError):
        load(deep_stage(case, engine, depth=5), one)


@pytest.mark.slow
def test_a_whole_run_tells_the_depth_everywhere(case, tmp_path, monkeypatch):
    recipe = recipe_of(case, tmp_path)
    recipe.distill.depth = 4
    assert "student (4 blocks, its teacher 2)" in dry_run(recipe).parameters
    distill(recipe, tmp_path / "runs", "sprint distill run")
    run = tmp_path / "runs" / "run"
    assert [understand(run / role).sizes.depth for role in ("student", "teacher")] == [4, 2]
    assert load_generator(str(run / "student")).pictures(["a red circle"], [0], 1).shape == (1, 64, 64, 3)
    told = "4 blocks, its teacher 2"
    assert (
        f"The student has {told} (the paper: as many): its seconds a picture"
        in (run / "report.html").read_text()
    )
    assert f"- Depth: {told}\n" in (run / "student" / "README.md").read_text()
    assert "Depth" not in (run / "teacher" / "README.md").read_text()
    assert ("depth", told) in [(one.about, one.what) for one in examine_run(run)]
    monkeypatch.chdir(tmp_path)
    assert any(f"its student: {told}" in one.what for one in _teacher(recipe))


@pytest.mark.slow
def test_diffusers_opens_a_deeper_student(monkeypatch, tmp_path):
    case = CASES["sana"]()
    network = grown(case.network(student=True), DEEP)
    pipeline = SanaSprintPipeline.from_pretrained(
        export_student(tmp_path / "student", network, None, case.encoders, {}), local_files_only=True
    )
    assert pipeline.transformer.config.num_layers == DEEP == len(pipeline.transformer.transformer_blocks)
    assert same(snapshot(pipeline.transformer), snapshot(network))


def test_a_pages_figures_say_of_how_many_blocks_the_seconds_are():
    def figures(own: int, teachers: int) -> list[str]:
        pace = {PACE.name: Measured({"drawing, ms a picture": Figure(20.0)})}
        columns = [
            Column(role, 1, role, measured=pace, depth=depth)
            for role, depth in ((STUDENT, own), (TEACHER, teachers))
        ]
        return [what for _, what, _ in key_figures(Result("run", columns))]

    assert figures(8, 4) == ["a picture, 1 step of 8 blocks"]
    assert figures(4, 4) == figures(8, 0) == ["a picture, 1 step"]  # an older result does not tell
