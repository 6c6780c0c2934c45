"""The contract around gram_loss: autograd, compilation, threads, memory and bad input."""

import pytest
import torch
from compare import assert_close, gradients
from contract import BATCH, assert_refused, assert_same_bits_on_any_number_of_threads, make, needs_library
from tolerances import ONE_PASS

import fastssl
from fastssl import _library
from fastssl._backends import OPS, Call, reasons_against

REMOVE = pytest.mark.parametrize("remove", ["none", "teacher", "both"])
PER_IMAGE = pytest.mark.parametrize("per_image", [True, False])


# ---- repeatability, autograd, compilation ----------------------------------------------------------------------


@needs_library
@REMOVE
@PER_IMAGE
@pytest.mark.parametrize(
    "shape", [(1, 97, 66), (9, 50, 66), (2, 420, 66), (7, 410, 34)], ids=["few", "one-pass", "long", "many-long"]
)
def test_same_bits_for_any_number_of_threads(cpu_path, remove, per_image, shape):
    student, teacher = make(*shape), torch.randn(shape)

    def run():
        loss = fastssl.gram_loss(student, teacher, remove_negatives=remove, per_image=per_image, backend="cpp")
        return loss, *gradients(loss, [student], torch.tensor(3.0))

    assert_same_bits_on_any_number_of_threads(run)


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
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("batch", [2, 9])
def test_the_gradient_of_one_pass_is_that_of_two(cpu_path, remove, normalize, batch):
    arguments = (
        torch.randn(batch, 210, 24),
        torch.randn(batch, 210, 24),
        normalize,
        ("none", "teacher", "both").index(remove),
    )
    loss, once = torch.ops.fastssl.gram_loss_forward(*arguments, 1)
    twice = torch.ops.fastssl.gram_loss_backward(torch.ones(()), *arguments)
    assert torch.equal(loss, torch.ops.fastssl.gram_loss_forward(*arguments, 0)[0])
    assert_close(once * 1e3, twice * 1e3, ONE_PASS)


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
    assert_refused("gram_loss", given, error, message)
