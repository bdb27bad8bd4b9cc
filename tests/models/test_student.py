import pytest
import torch

from sprint.maths.dual import value_and_tangent
from sprint.maths.losses import settled_logvar
from sprint.maths.trigflow import HALF_PI
from sprint.models.student import Student, TrainedStudent, from_adapted
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from tests.tiny import WIDTH, tiny_batch, tiny_network
from tests.tolerance import assert_close, near, rounding

T = torch.tensor([0.05, 0.5, 1.2, HALF_PI])


def make_student() -> Student:
    return Student(from_adapted(tiny_network()))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.5, 20.0])
@torch.no_grad()
def test_at_the_start_it_is_the_adapted_teacher_whatever_the_guidance(guidance):
    adapted, student = tiny_network(), make_student()
    x_hat, text, mask = tiny_batch(4)
    F = TrigFlowView(adapted, DENSE_TIME)(x_hat, T, text, mask)
    assert torch.equal(student(x_hat, T, text, mask, torch.full((4,), guidance)), F)


def test_guidance_embedder_can_learn():
    """First layer random, last layer zero: the last one's gradient depends on the scale at once."""
    student = make_student()
    embedder = student.network.time_embed.guidance_embedder
    assert embedder.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for zero in (embedder.linear_1.bias, embedder.linear_2.weight, embedder.linear_2.bias):
        assert (zero == 0).all()

    def gradient(scale: float):
        student.zero_grad()
        x_hat, text, mask = tiny_batch(4)
        student(x_hat, T, text, mask, torch.full((4,), scale)).square().mean().backward()
        return embedder.linear_2.weight.grad.clone()

    low, high = gradient(1.0), gradient(5.0)
    assert low.norm() > 0
    assert (high - low).norm() > 1e-3 * low.norm()


def test_after_one_step_guidance_matters():
    student = make_student()
    x_hat, text, mask = tiny_batch(4)
    guidance = torch.tensor([1.0, 5.0, 1.0, 5.0])
    last = student.network.time_embed.guidance_embedder.linear_2
    optimizer = torch.optim.SGD(last.parameters(), lr=1.0)
    student(x_hat, T, text, mask, guidance).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        F = [student(x_hat, T, text, mask, torch.full((4,), scale)) for scale in (1.0, 5.0)]
    assert (F[0] - F[1]).norm() > 1e-4 * F[0].norm()


def test_all_weights_come_from_the_adapted_teacher_but_the_guidance_embedder():
    adapted, network = tiny_network(), from_adapted(tiny_network())
    own, theirs = network.state_dict(), adapted.state_dict()
    new = [key for key in own if "guidance_embedder" in key]
    assert len(new) == 4 and len(own) == len(theirs) + 4
    renamed = "time_embed.timestep_embedder.linear_1.weight"
    assert torch.equal(own[renamed], theirs["time_embed.emb.timestep_embedder.linear_1.weight"])
    assert not any(p.is_meta for p in network.parameters())
    network.proj_out.weight.data.zero_()
    assert adapted.proj_out.weight.norm() > 0


def test_log_variance_starts_at_zero_and_has_a_bias():
    student = make_student()
    guidance = torch.full((4,), 4.5)
    assert student.log_variance(T, guidance).tolist() == [0, 0, 0, 0]
    student.logvar.bias.data.fill_(-3.0)
    logvar = student.log_variance(T, guidance)
    assert logvar.shape == (4,) and logvar.tolist() == [-3, -3, -3, -3]
    assert sum(p.numel() for p in student.logvar.parameters()) == WIDTH + 1


def test_log_variance_can_start_where_it_settles():
    """A gentle fit: the mean is exact and the residual smaller than the target's own spread."""
    student = make_student()
    t = torch.linspace(0.05, 1.5, 400)
    guidance = torch.full_like(t, 4.5)
    target = settled_logvar(t, 64)
    student.start_log_variance(t, guidance, target)
    logvar = student.log_variance(t, guidance)
    fit = rounding(torch.float32, terms=len(t), steps=WIDTH)  # a factorisation, a column after the other
    assert logvar.mean().item() == near(target.mean().item(), fit)
    assert (logvar - target).std() < target.std()
    assert student.logvar.weight.norm() > 0


def test_log_variance_trains_the_head_on_the_networks_own_embedding():
    student = make_student()
    embedded = []
    student.logvar.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    student.log_variance(T, torch.full((4,), 4.5)).sum().backward()
    assert embedded[0].shape == (4, WIDTH)
    assert_close(student.logvar.weight.grad[0], embedded[0].sum(0), rounding(torch.float32, terms=4))


def test_one_call_of_the_trained_module_gives_the_velocity_and_the_log_variance():
    """A dual goes through the velocity; the log-variance is of the value alone and has its own gradient."""
    student = make_student()
    torch.nn.init.normal_(student.logvar.weight)
    trained, guidance = TrainedStudent(student), torch.full((4,), 4.5)
    x_hat, text, mask = tiny_batch(4)
    F, logvar = trained(x_hat, T, text, mask, guidance)
    assert torch.equal(F, student(x_hat, T, text, mask, guidance))
    assert torch.equal(logvar, student.log_variance(T, guidance)) and logvar.shape == (4,)

    beside = []

    def F_alone(x_hat, t):
        return student(x_hat, t, text, mask, guidance)

    def F_beside_logvar(x_hat, t):
        F, logvar = trained(x_hat, t, text, mask, guidance)
        beside.append(logvar)
        return F

    point = x_hat, T, x_hat.flip(0), torch.sin(T)
    for ours, theirs in zip(
        value_and_tangent(F_beside_logvar, *point), value_and_tangent(F_alone, *point), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert type(beside[0]) is torch.Tensor and torch.equal(beside[0], logvar)
    beside[0].sum().backward()
    assert student.logvar.weight.grad.norm() > 0
