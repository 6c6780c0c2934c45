"""What the tests of self_relation_loss's Triton kernels share: inputs, the comparison with float64, raw operators."""

import pytest
import torch
from compare import assert_close, doubles, gradients
from launches import launched_from
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl import kernels
from fastssl.reference.self_relation_loss import self_relation_loss as reference

needs_interpreter = pytest.mark.skipif(
    kernels.why_not("cpu") is not None, reason=kernels.why_not("cpu") or "triton runs under its interpreter"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
KINDS = pytest.mark.parametrize("kind", ["pixel", "channel"])
#: The mean takes its gradient from the forward operator where that is worthwhile; single losses have weights.
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])


def make(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def constant(*shape, dtype=torch.float32):
    return make(*shape, dtype=dtype).detach()


def check(student, teacher, *, student_columns=None, teacher_columns=None, tolerances=None, upstream=None, **kwargs):
    """Value and gradients of one call, which is returned. tolerances: of the value and of the gradients."""
    columns = {"student_columns": student_columns, "teacher_columns": teacher_columns}
    leaves = [student, student_columns]
    out = fastssl.self_relation_loss(student, teacher, **columns, backend="triton", **kwargs)
    assert out.dtype == torch.float32
    student64, columns64, teacher64, teacher_columns64 = doubles([*leaves, teacher, teacher_columns])
    columns = {"student_columns": columns64, "teacher_columns": teacher_columns64}
    truth = reference(student64, teacher64, **columns, **kwargs)
    given = [t for t in (student, student_columns, teacher, teacher_columns) if t is not None]
    forward, gradient = tolerances or (max(table[t.dtype] for t in given) for table in (FORWARD, GRADIENT))
    assert_close(out, truth, forward, "value")
    if upstream is None:
        upstream = torch.randn_like(out) if kwargs.get("reduction") == "none" else torch.tensor(float(out.numel()))
    got = gradients(out, leaves, upstream)
    expected = gradients(truth, [student64, columns64], upstream.double())
    for g, e, leaf in zip(got, expected, [t for t in leaves if t is not None and t.requires_grad], strict=True):
        assert g.dtype == leaf.dtype
        assert_close(g, e, gradient, "gradient")
    return out


def numbers(student, teacher, student_columns=None, teacher_columns=None, *, kind="pixel", heads=1, scale=0.3,
            normalize=False):  # fmt: skip
    """The arguments of the raw operators, but for what is wanted."""
    symmetric = student_columns is None
    columns = (student, teacher) if symmetric else (student_columns, teacher_columns)
    return (
        student,
        teacher,
        *columns,
        int(kind == "channel"),
        heads,
        scale,
        1.5 * scale,
        int(normalize),
        int(symmetric),
    )


def run_forward(*arguments):
    return torch.ops.fastssl.self_relation_loss_forward_triton(*arguments)


def run_backward(*arguments):
    return torch.ops.fastssl.self_relation_loss_backward_triton(*arguments)


def launched(monkeypatch):
    """The names of the kernels that will have been launched."""
    from fastssl.kernels import self_relation_loss, self_relation_loss_backward

    return launched_from(monkeypatch, self_relation_loss, self_relation_loss_backward)
