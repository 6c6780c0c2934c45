"""What holds for both losses on the CPU: autograd, compilation, constants, and gradients that come with their loss."""

import copy

import pytest
import torch
from compare import gradients
from contract import BATCH, GRAM, MEANS, RELATION, Loss, leaves, losses, make, needs_library
from tolerances import GRADIENT

BOTH = pytest.mark.parametrize("loss", [RELATION, GRAM], ids=["relation", "gram"])


# ---- compilation -----------------------------------------------------------------------------------------------


@needs_library
@losses()
def test_compiled_whole_with_dynamic_batch(loss):
    def step(given):
        return loss({**given, "student": given["student"] * 2}).square()

    torch._dynamo.reset()  # or the code compiled for other parameters counts as one more of this
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5, 9, 11):
        given = loss.given(batch)
        out, expected = compiled(given), step(given)
        torch.testing.assert_close(out, expected)
        upstream = torch.full_like(out, 1.5)
        for a, b in zip(*(gradients(x, leaves(given), upstream) for x in (out, expected)), strict=True):
            torch.testing.assert_close(a, b)


@needs_library
@BOTH
def test_compiled_by_inductor(loss):
    def step(student, teacher):
        return loss({"student": student + 1, "teacher": teacher}) * 3

    compiled = torch.compile(step, fullgraph=True)
    student, teacher = make(9, 11, 8), torch.randn(9, 11, 8)
    out, expected = compiled(student, teacher), step(student, teacher)
    torch.testing.assert_close(out, expected)
    upstream = torch.ones(())
    torch.testing.assert_close(gradients(out, [student], upstream), gradients(expected, [student], upstream))


# ---- derivatives that are refused, or many at once -------------------------------------------------------------


@needs_library
@losses()
@BATCH
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_are_refused(loss, batch, power):
    """Also where the gradient that comes in is a constant: a gradient penalty would count as nothing."""
    given = loss.given(batch)
    value = loss(given).sum() ** power
    (grad,) = torch.autograd.grad(value, given["student"], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{loss.op}: second derivatives are not implemented"):
        (value + grad.square().sum()).backward()


@needs_library
@BOTH
def test_function_transforms_work_or_are_refused(loss):
    student, teacher = make(3, 4, 4), torch.randn(3, 4, 4)

    def run(x):
        return loss({"student": x, "teacher": teacher})

    expected = gradients(run(student), [student], torch.ones(()))[0]
    assert torch.equal(torch.func.grad(run)(student.detach()), expected)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.func.grad(lambda x: torch.func.grad(run)(x).square().sum())(student.detach())
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: loss({"student": x[None], "teacher": teacher[:1]}))(student)


@needs_library
@BOTH
@BATCH
def test_several_upstream_gradients_at_once(loss, batch):
    given = loss.given(batch)
    value, student = loss(given), given["student"]
    factors = torch.tensor([1.0, 2.0, -0.5])
    (batched,) = torch.autograd.grad(value, student, factors, retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(batched, factors[:, None, None, None] * one)


@needs_library
@BOTH
def test_forward_mode_is_refused_not_wrong(loss):
    student, teacher = torch.randn(1, 4, 4), torch.randn(1, 4, 4)

    def run(backend):
        return lambda x: loss({"student": x, "teacher": teacher}, backend)

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(run("cpp"), (student,), (torch.ones_like(student),))
    _, tangent = torch.func.jvp(run("reference"), (student,), (torch.randn_like(student),))
    assert tangent.abs() > 0


# ---- what is kept, handed out and left alone -------------------------------------------------------------------


@needs_library
@losses()
@BATCH
def test_the_loss_is_the_same_with_and_without_gradients(loss, batch):
    given = loss.given(batch, 37, 24)
    assert torch.equal(loss(given), loss({name: t.detach() for name, t in given.items()}))


@needs_library
@losses(MEANS)
@BATCH
def test_nothing_is_written_to_and_the_graph_may_be_kept(loss, batch):
    given = loss.given(batch)
    before = copy.deepcopy({name: t.detach() for name, t in given.items()})
    upstream = torch.tensor(2.5)
    value = loss(given)
    first = torch.autograd.grad(value, leaves(given), upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(7)  # as gradient clipping does; it must not reach the graph
    second = torch.autograd.grad(value, leaves(given), upstream)
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))
    assert all(torch.equal(given[name], t) for name, t in before.items())
    assert upstream == 2.5
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, leaves(given), upstream)


@needs_library
@BOTH
def test_a_gradient_of_one_is_handed_out_as_it_is(loss, monkeypatch):
    """No pass over the gradient for `loss.backward()`: what backward returns is what forward computed."""
    made, name = [], f"{loss.op}_forward"
    real = getattr(torch.ops.fastssl, name)

    def spy(*call):
        made.append(real(*call))
        return made[-1]

    monkeypatch.setattr(torch.ops.fastssl, name, spy)
    given = loss.given(9)
    (grad,) = torch.autograd.grad(loss(given), given["student"], torch.ones(()))
    assert grad.data_ptr() in {t.data_ptr() for t in made[0][1:] if t.numel()}


@needs_library
@losses()
@BATCH
def test_a_teacher_made_in_inference_mode(loss, batch):
    given = loss.given(batch)
    expected = loss.gradients(given)
    with torch.inference_mode():
        made = {name: t.clone() for name, t in given.items() if name.startswith("teacher")}
    got = loss.gradients({**given, **made})
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@losses(MEANS)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_library)])
def test_the_teacher_is_a_constant(loss, backend):
    given = loss.given(9)
    given["teacher"].requires_grad_()
    assert torch.autograd.grad(loss(given, backend), given["teacher"], allow_unused=True) == (None,)
    alone = {name: t.detach() if name.startswith("student") else t for name, t in given.items()}
    assert not loss(alone, backend).requires_grad


@needs_library
@pytest.mark.parametrize(
    ("loss", "shape", "away"),
    [(Loss("self_relation_loss", {}), (64, 256, 8), 1e-3), (GRAM, (64, 196, 64), 0.1)],
    ids=["relation", "gram"],
)
def test_float16_gradients_wait_for_the_loss_scaling(loss, shape, away):
    """Mostly below float16's smallest number, until backward multiplies them by 2^16."""
    student = make(*shape, dtype=torch.float16)
    teacher = (student.detach().float() + away * torch.randn(shape)).half()
    scaled = loss({"student": student, "teacher": teacher}) * 2.0**16
    exact = student.detach().double().requires_grad_()
    truth = loss({"student": exact, "teacher": teacher.double()}, "reference") * 2.0**16
    got, expected = (torch.autograd.grad(x, leaf)[0].double() for x, leaf in ((scaled, student), (truth, exact)))
    assert (got - expected).norm() <= GRADIENT[torch.float16] * expected.norm()
