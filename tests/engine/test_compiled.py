"""Compiled blocks: the same values, tangents and gradients, from graphs that are really compiled, and counted.

One test runs the compiler itself; the others stop before its last stage, which needs no minutes.
"""

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from sprint.base.errors import SprintError
from sprint.engine import compiled
from sprint.engine.compiled import compile_blocks
from sprint.maths.dual import value_and_tangent
from sprint.models.student import Student
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.train.distill import DistillStage
from tests.tiny import DEPTH, LATENT, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.tolerance import assert_all_close, assert_close, growing, of_network

T = torch.tensor([0.1, 0.7, 1.5])
GUIDANCE = torch.tensor([4.0, 4.5, 5.0])


@pytest.fixture
def without_code(monkeypatch):
    """Trace, differentiate and divide the graphs as for the compiler, but run them as they are."""
    compile = torch.compile
    monkeypatch.setattr(
        compiled.torch,
        "compile",
        lambda graph, **how: compile(graph, backend="aot_eager_decomp_partition", **how),
    )


def make_student() -> Student:
    return Student(tiny_network(guidance_embeds=True)).train()


def results(student: Student) -> dict[str, torch.Tensor]:
    """Value and tangent of a dual forward, value of a plain one, and the gradients of both."""
    x_hat, text, mask = tiny_batch(3)

    def F(x_hat, t):
        return student(x_hat, t, text, mask, GUIDANCE)

    value, tangent = value_and_tangent(F, x_hat, T, x_hat.flip(0), torch.sin(T))
    assert not tangent.requires_grad
    value.square().mean().backward()
    plain = F(x_hat, T)
    plain.square().mean().backward()
    grads = {name: p.grad for name, p in student.network.named_parameters()}
    return {"value": value, "tangent": tangent, "plain": plain} | grads


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def assert_same(ours: dict, theirs: dict) -> None:
    """Outputs each for itself, gradients together."""
    tolerance = of_network(tiny_network(guidance_embeds=True), passes=4)
    outputs = theirs.keys() & {"value", "tangent", "plain"}
    for name in outputs:
        assert_close(ours[name], theirs[name], tolerance)
    gradients = theirs.keys() - outputs
    if gradients:
        assert_all_close(*({name: all[name] for name in gradients} for all in (ours, theirs)), tolerance)


@pytest.mark.slow
def test_the_compiler_itself_gives_the_same():
    eager, student = results(make_student()), make_student()
    before, compiler = compiled_graphs(), compile_blocks(student.network)
    assert_same(results(student), eager)
    assert len(compiler.graphs) == compiled_graphs() - before == 2
    assert_same(results(student), {name: eager[name] for name in ("value", "tangent", "plain")})
    # duals and plain tensors, whatever the depth
    assert len(compiler.graphs) == compiled_graphs() - before == 2


@pytest.mark.parametrize("recompute", [False, True])
def test_before_its_last_stage_too(without_code, recompute):
    eager, student = results(make_student()), make_student()
    compile_blocks(student.network, recompute)
    assert_same(results(student), eager)


def saved_bytes(student: Student) -> int:
    """What the graph of a dual forward keeps, besides weights."""
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    seen: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    x_hat, text, mask = tiny_batch(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value, _ = value_and_tangent(
            lambda x, t: student(x, t, text, mask, GUIDANCE), x_hat, T, x_hat.flip(0), torch.sin(T)
        )
    del value
    return sum(seen.values())


def test_recomputing_keeps_less(without_code):
    sizes = []
    for recompute in (False, True):
        student = make_student()
        compile_blocks(student.network, recompute)
        results(student)
        sizes.append(saved_bytes(student))
    assert sizes[1] < 0.5 * sizes[0]


def test_hooks_on_blocks_fire(without_code):
    student, seen = make_student(), []
    compile_blocks(student.network)
    for block in student.network.transformer_blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(type(output).__name__))
    results(student)
    assert seen == ["Dual"] * DEPTH + ["Tensor"] * DEPTH


def test_a_call_of_another_kind_gets_its_own_graph(without_code):
    network = tiny_network()
    compiler = compile_blocks(network)
    view, plain = TrigFlowView(network, DENSE_TIME), TrigFlowView(tiny_network(), DENSE_TIME)
    x_hat, text, mask = tiny_batch(3)
    kinds = []
    for size, grad in ((3, True), (3, False), (2, False), (3, False)):
        with torch.set_grad_enabled(grad):
            inputs = x_hat[:size], T[:size], text[:size], mask[:size]
            assert_close(view(*inputs), plain(*inputs), of_network(network))
        kinds.append(len(compiler.graphs))
    assert kinds == [1, 2, 3, 3]


def test_both_phases_of_training_are_the_same(without_code, engine):
    losses = []
    for compile in (False, True):
        recipe = tiny_recipe()
        recipe.compile = compile
        stage = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
        losses.append([stage.update(step, tiny_batch(seed=step)).read(engine)["loss"] for step in range(4)])
    assert losses[1] == growing(losses[0], of_network(tiny_network(), passes=4))


@inductor.patch({"cpp.cxx": (None, "/no/compiler"), "fx_graph_cache": False})
def test_without_a_compiler_one_clear_line():
    student = make_student()
    compile_blocks(student.network)
    with pytest.raises(SprintError, match="run with compile=false"):
        results(student)
