"""The contract around gram_loss: autograd, compilation, threads, memory and bad input."""

import pytest
import torch
from compare import assert_close, gradients

import fastssl
from fastssl import _library
from fastssl._backends import OPS, Call, reasons_against

needs_library = pytest.mark.skipif(not _library.loaded(), reason=_library.why_not or "")
REMOVE = pytest.mark.parametrize("remove", ["none", "teacher", "both"])
PER_IMAGE = pytest.mark.parametrize("per_image", [True, False])
BATCH = pytest.mark.parametrize("batch", [2, 9], ids=["two-pass", "one-pass"])


def make(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape).to(dtype).requires_grad_(grad)


# ---- repeatability, autograd, compilation ----------------------------------------------------------------------


@needs_library
@REMOVE
@PER_IMAGE
@pytest.mark.parametrize(
    "shape", [(1, 97, 66), (9, 50, 66), (2, 420, 66), (7, 410, 34)], ids=["few", "one-pass", "long", "many-long"]
)
def test_same_bits_for_any_number_of_threads(cpu_path, remove, per_image, shape):
    student, teacher = make(*shape), torch.randn(shape)
    results = []
    for threads in (1, 2, 3, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        loss = fastssl.gram_loss(student, teacher, remove_negatives=remove, per_image=per_image, backend="cpp")
        results.append((loss, *gradients(loss, [student], torch.tensor(3.0))))
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@BATCH
def test_the_loss_is_the_same_with_and_without_gradients(batch):
    student, teacher = make(batch, 37, 24), torch.randn(batch, 37, 24)
    assert torch.equal(fastssl.gram_loss(student, teacher), fastssl.gram_loss(student.detach(), teacher))


@needs_library
@REMOVE
@PER_IMAGE
@BATCH
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(remove, per_image, batch, normalize):
    student, teacher = make(batch, 5, 6, dtype=torch.float64), torch.randn(batch, 5, 4, dtype=torch.float64)
    x = student.detach()
    x = torch.nn.functional.normalize(x, dim=-1) if normalize else x
    x = x if per_image else x.flatten(0, 1)
    assert (x @ x.mT).abs().min() > 1e-5  # gradcheck's steps cross no kink

    def run(student):
        return fastssl.gram_loss(
            student, teacher, normalize=normalize, remove_negatives=remove, per_image=per_image, backend="cpp"
        )

    assert torch.autograd.gradcheck(run, [student])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch", [0, 2, 9])
@pytest.mark.parametrize("remove", [0, 1, 2])
def test_opcheck(dtype, batch, remove):
    student = torch.randn(batch, 9, 6).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    common = (student, torch.randn(batch, 9, 8), 1, remove)
    ops = torch.ops.fastssl
    for wanted in (0, 1):
        torch.library.opcheck(ops.gram_loss_forward, (*common, wanted))
    loss, _ = ops.gram_loss_forward(*common, 0)
    torch.library.opcheck(ops.gram_loss_backward, (torch.ones_like(loss), *common))


@needs_library
@REMOVE
@PER_IMAGE
def test_compiled_whole_with_dynamic_batch(remove, per_image):
    def step(student, teacher):
        return fastssl.gram_loss(student * 2, teacher, remove_negatives=remove, per_image=per_image).sqrt()

    torch._dynamo.reset()  # or the code compiled for other parameters counts as one more of this
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5, 9, 11):
        student, teacher = make(batch, 9, 8), torch.randn(batch, 9, 8)
        out, expected = compiled(student, teacher), step(student, teacher)
        torch.testing.assert_close(out, expected)
        upstream = torch.tensor(1.5)
        torch.testing.assert_close(gradients(out, [student], upstream), gradients(expected, [student], upstream))


@needs_library
def test_compiled_by_inductor():
    def step(student, teacher):
        return fastssl.gram_loss(student + 1, teacher) * 3

    compiled = torch.compile(step, fullgraph=True)
    student, teacher = make(9, 11, 8), torch.randn(9, 11, 8)
    out, expected = compiled(student, teacher), step(student, teacher)
    torch.testing.assert_close(out, expected)
    upstream = torch.ones(())
    torch.testing.assert_close(gradients(out, [student], upstream), gradients(expected, [student], upstream))


@needs_library
@BATCH
def test_second_derivatives_are_refused(batch):
    student = make(batch, 4, 4)
    loss = fastssl.gram_loss(student, torch.randn(batch, 4, 4), backend="cpp").square()
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@needs_library
def test_forward_mode_is_refused_not_wrong():
    student, teacher = torch.randn(1, 4, 4), torch.randn(1, 4, 4)

    def run(backend):
        return lambda x: fastssl.gram_loss(x, teacher, backend=backend)

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(run("cpp"), (student,), (torch.ones_like(student),))
    _, tangent = torch.func.jvp(run("reference"), (student,), (torch.randn_like(student),))
    assert tangent.abs() > 0


@needs_library
@PER_IMAGE
@BATCH
def test_nothing_is_written_to_and_the_graph_may_be_kept(batch, per_image):
    student, teacher = make(batch, 9, 8), torch.randn(batch, 9, 8)
    before = student.detach().clone(), teacher.clone()
    upstream = torch.tensor(2.5)
    loss = fastssl.gram_loss(student, teacher, per_image=per_image, backend="cpp")
    (first,) = torch.autograd.grad(loss, student, upstream, retain_graph=True)
    kept = first.clone()
    first.mul_(7)  # as gradient clipping does; it must not reach the graph
    (second,) = torch.autograd.grad(loss, student, upstream)
    assert torch.equal(kept, second)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    assert upstream == 2.5
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, student, upstream)


@needs_library
@REMOVE
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("batch", [2, 9])
def test_the_gradient_of_one_pass_is_that_of_two(cpu_path, remove, normalize, batch):
    arguments = (
        torch.randn(batch, 61, 24),
        torch.randn(batch, 61, 24),
        normalize,
        ("none", "teacher", "both").index(remove),
    )
    loss, once = torch.ops.fastssl.gram_loss_forward(*arguments, 1)
    twice = torch.ops.fastssl.gram_loss_backward(torch.ones(()), *arguments)
    assert torch.equal(loss, torch.ops.fastssl.gram_loss_forward(*arguments, 0)[0])
    assert_close(once * 1e3, twice * 1e3, 1e-6)


@needs_library
def test_a_gradient_of_one_is_handed_out_as_it_is(monkeypatch):
    """No pass over the gradient for `loss.backward()`: what backward returns is what forward computed."""
    made = []
    real = torch.ops.fastssl.gram_loss_forward

    def spy(*call):
        made.append(real(*call))
        return made[-1]

    monkeypatch.setattr(torch.ops.fastssl, "gram_loss_forward", spy)
    student = make(9, 9, 8)
    loss = fastssl.gram_loss(student, torch.randn(9, 9, 8), backend="cpp")
    assert torch.autograd.grad(loss, student, torch.ones(()))[0].data_ptr() == made[0][1].data_ptr()


@needs_library
def test_float16_gradients_wait_for_the_loss_scaling():
    """Mostly below float16's smallest number, until backward multiplies them by 2^16."""
    student = make(64, 196, 64, dtype=torch.float16)
    teacher = (student.detach().float() + 0.1 * torch.randn(64, 196, 64)).half()
    scaled = fastssl.gram_loss(student, teacher, backend="cpp") * 2.0**16
    exact = student.detach().double().requires_grad_()
    truth = fastssl.gram_loss(exact, teacher.double(), backend="reference") * 2.0**16
    got, expected = (torch.autograd.grad(x, leaf)[0].double() for x, leaf in ((scaled, student), (truth, exact)))
    assert (got - expected).norm() <= 1e-2 * expected.norm()


@needs_library
def test_raw_operators_refuse_what_would_read_elsewhere():
    x = torch.randn(1, 5, 4)
    ops = torch.ops.fastssl
    with pytest.raises(RuntimeError, match="the same batch and number of tokens"):
        ops.gram_loss_forward(x, x[:, :3], 1, 0, 0)
    with pytest.raises(RuntimeError, match="remove must be 0, 1 or 2"):
        ops.gram_loss_forward(x, x, 1, 3, 0)
    with pytest.raises(RuntimeError, match="grad must be a scalar in the loss's dtype"):
        ops.gram_loss_backward(torch.ones((), dtype=torch.float64), x, x, 1, 0)
    with pytest.raises(RuntimeError, match="grad must be a scalar in the loss's dtype"):
        ops.gram_loss_backward(torch.ones(1), x, x, 1, 0)


@REMOVE
@PER_IMAGE
def test_the_docstring_equivalent_is_true(remove, per_image):
    student, teacher = torch.randn(3, 9, 8), torch.randn(3, 9, 5)
    x = torch.nn.functional.normalize(student.float(), dim=-1)
    y = torch.nn.functional.normalize(teacher.float(), dim=-1).detach()
    if not per_image:
        x, y = x.flatten(0, 1), y.flatten(0, 1)
    s, t = x @ x.mT, y @ y.mT
    if remove in ("teacher", "both"):
        t = t.where(t >= 0, 0)
    if remove == "both":
        s = s.where(s >= 0, 0)
    expected = (s - t).square().mean()
    for backend in ("reference", *(["cpp"] if _library.loaded() else [])):
        loss = fastssl.gram_loss(student, teacher, remove_negatives=remove, per_image=per_image, backend=backend)
        torch.testing.assert_close(loss, expected)


def test_the_teacher_is_a_constant():
    student, teacher = make(9, 5, 4), make(9, 5, 4)
    for backend in ("reference", *(["cpp"] if _library.loaded() else [])):
        loss = fastssl.gram_loss(student, teacher, backend=backend)
        assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)
        assert not fastssl.gram_loss(student.detach(), teacher, backend=backend).requires_grad


def test_what_each_backend_takes():
    def reasons(backend, device, student, teacher):
        call = Call("gram_loss", device, (("student", student), ("teacher", teacher)), True, {"rows": 5000, "depth": 7})
        return "; ".join(reasons_against(OPS["gram_loss"].backend(backend), call))

    assert reasons("reference", "mps", torch.float16, torch.float32) == ""
    assert "takes tensors on cpu, got cuda" in reasons("cpp", "cuda", torch.float32, torch.float32)
    assert "teacher of dtype float32, bfloat16, float16, got float64" in reasons(
        "triton", "cuda", torch.float32, torch.float64
    )
    if _library.loaded():
        assert reasons("cpp", "cpu", torch.bfloat16, torch.float64) == ""


# ---- memory ----------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("batch", [1, 8], ids=["two-pass", "one-pass"])
def test_tensors_are_the_loss_and_the_gradient(batch):
    """To the byte: what torch allocates in forward and backward together."""
    import memory

    def extra(length):
        student, teacher = make(batch, length, 32), torch.randn(batch, length, 32)

        class Step:
            prepare = staticmethod(lambda: None)

            @staticmethod
            def run(_):
                return torch.autograd.grad(fastssl.gram_loss(student, teacher, backend="cpp"), student)

        Step.run(None)
        return memory.extra_bytes(Step, "cpu")

    for length in (100, 400):
        assert extra(length) <= batch * length * 32 * 4 + 1024


# ---- bad input -------------------------------------------------------------------------------------------------

X = torch.randn(2, 5, 6)
BAD = [
    (dict(student=[1.0]), TypeError, "student must be a Tensor, got list"),
    (dict(teacher=None), TypeError, "teacher must be a Tensor, got NoneType"),
    (dict(student=X[0]), ValueError, r"student must be \(B, N, C\) or \(B, C, h, w\), got \(5, 6\)"),
    (dict(teacher=X[0]), ValueError, r"teacher must be \(B, N, C\) or \(B, C, h, w\), got \(5, 6\)"),
    (dict(teacher=X.long()), TypeError, "teacher must have dtype .*, got dtype int64"),
    (dict(student=X.to_sparse()), ValueError, "student must be a dense"),
    (dict(teacher=X.to("meta")), ValueError, "teacher must be on the device of student .cpu., got meta"),
    (dict(teacher=X[:1]), ValueError, r"teacher must have student's batch and number of tokens \(B = 2, N = 5\)"),
    (dict(teacher=X[:, :4]), ValueError, r"teacher must have student's batch and number .*, got \(2, 4, 6\)"),
    (dict(teacher=X[..., :0]), ValueError, r"teacher must have at least one channel, got \(2, 5, 0\)"),
    (dict(student=X[..., :0]), ValueError, r"student must have at least one channel, got \(2, 5, 0\)"),
    (dict(normalize=1), TypeError, "normalize must be True or False, got int"),
    (dict(per_image="yes"), TypeError, "per_image must be True or False, got str"),
    (dict(remove_negatives="student"), ValueError, "remove_negatives must be one of 'none', 'teacher', 'both', got"),
    (dict(remove_negatives=True), ValueError, "remove_negatives must be one of .*, got True"),
    (dict(backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_sentence(change, error, message):
    given = {"student": X, "teacher": X, **change}
    with pytest.raises(error, match=message) as caught:
        fastssl.gram_loss(**given)
    assert str(caught.value).startswith("gram_loss: ")
    assert "\n" not in str(caught.value)
    if "backend" not in given:
        with pytest.raises(error, match=message):
            fastssl.explain("gram_loss", **given)
