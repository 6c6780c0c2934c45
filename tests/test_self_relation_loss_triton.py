"""self_relation_loss's Triton kernels under Triton's interpreter, against float64, in float32 and float16.

bfloat16 is left to tests/test_triton_compile.py and to machines with a GPU, but for products of two dtypes, which are
made in float32: see tests/test_triton_interpreter.py. "Together" is loss and gradient in one launch, "apart" in two.
"""

import pytest
import torch
from compare import assert_close, gradients
from relation_loss_triton import DTYPES, KINDS, REDUCTIONS, check, constant, make, needs_interpreter
from tolerances import FORWARD, LARGE_LOGITS

import fastssl
from fastssl.reference.self_relation_loss import self_relation_loss as reference

pytestmark = needs_interpreter

# ---- values and gradients --------------------------------------------------------------------------------------


@DTYPES
@KINDS
@REDUCTIONS
@pytest.mark.parametrize(("length", "width", "heads"), [(1, 33, 3), (37, 33, 1), (12, 48, 6)])
def test_lengths_and_heads(dtype, kind, reduction, length, width, heads):
    check(make(1, length, width, dtype=dtype), constant(1, length, width, dtype=dtype), kind=kind, num_heads=heads,
          reduction=reduction)  # fmt: skip


@DTYPES
@pytest.mark.parametrize(
    ("kind", "length", "width"), [("pixel", 197, 64), ("pixel", 300, 16), ("channel", 20, 100), ("channel", 140, 65)]
)
def test_larger(dtype, kind, length, width):
    # A temperature that leaves rows unsaturated: half-precision gradients of one-hot rows are rounding alone.
    temp = 6.0 if kind == "pixel" else 1.0
    check(make(1, length, width, dtype=dtype), constant(1, length, width, dtype=dtype), kind=kind, student_temp=temp)


@DTYPES
@pytest.mark.parametrize(("width", "reduction"), [(16, "none"), (70, "mean"), (130, "none"), (300, "none")])
def test_depths(dtype, width, reduction):
    """One block of depth, several, and what is left over; the teacher's differs."""
    check(make(1, 19, width, dtype=dtype), constant(1, 19, 75, dtype=dtype), reduction=reduction, student_temp=4.0)


@KINDS
@pytest.mark.parametrize("dtypes", ["float32 float16", "float16 float32", "float32 bfloat16"])
def test_teachers_of_another_width_and_dtype(kind, dtypes):
    mine, other = (getattr(torch, name) for name in dtypes.split())
    if other is torch.bfloat16:  # rows and columns differ, so that the product is float32
        columns = {"student_columns": make(1, 23, 36), "teacher_columns": constant(1, 23, 36)}
        check(make(1, 23, 36, dtype=mine), constant(1, 23, 36, dtype=other), kind=kind, num_heads=2, **columns)
    else:
        shape = (1, 23, 66) if kind == "pixel" else (1, 41, 36)
        check(make(1, 23, 36, dtype=mine), constant(*shape, dtype=other), kind=kind, num_heads=2)


@DTYPES
@KINDS
@REDUCTIONS
@pytest.mark.parametrize("normalize", [False, True])
def test_columns(dtype, kind, reduction, normalize):
    """For pixels, other tokens and a narrower teacher; for channels, other channels and fewer of its tokens."""
    rows, others = (1, 19, 34), (1, 26 if kind == "pixel" else 19, 34)
    teacher_rows, teacher_others = [(1, n, 18) if kind == "pixel" else (1, 13, c) for _, n, c in (rows, others)]
    columns = {
        "student_columns": make(*others, dtype=dtype),
        "teacher_columns": constant(*teacher_others, dtype=dtype),
    }
    check(make(*rows, dtype=dtype), constant(*teacher_rows, dtype=dtype), **columns, kind=kind, num_heads=2,
          reduction=reduction, normalize=normalize, scale=2.0)  # fmt: skip


@DTYPES
@REDUCTIONS
def test_many_columns(dtype, reduction):
    check(make(1, 70, 24, dtype=dtype), constant(1, 70, 24, dtype=dtype), student_columns=make(1, 90, 24, dtype=dtype),
          teacher_columns=constant(1, 90, 24, dtype=dtype), reduction=reduction)  # fmt: skip


def test_one_side_has_columns():
    """Without columns of its own, the student's rows get both parts of the gradient."""
    check(make(1, 20, 24), constant(1, 20, 24), teacher_columns=constant(1, 20, 24))
    check(make(1, 20, 24), constant(1, 20, 24), student_columns=make(1, 20, 24))


@pytest.mark.parametrize("dtypes", ["float32 float16", "float16 float32", "float32 bfloat16", "bfloat16 float32"])
@pytest.mark.parametrize("normalize", [False, True])
def test_columns_of_another_dtype(dtypes, normalize):
    mine, other = (getattr(torch, name) for name in dtypes.split())
    columns = {"student_columns": make(1, 19, 18, dtype=other), "teacher_columns": constant(1, 19, 18)}
    check(make(1, 17, 18, dtype=mine), constant(1, 17, 18, dtype=mine), normalize=normalize, scale=2.0, **columns)


@DTYPES
@KINDS
@REDUCTIONS
def test_normalize(dtype, kind, reduction):
    check(make(1, 23, 34, dtype=dtype), constant(1, 23, 34, dtype=dtype), kind=kind, num_heads=2, reduction=reduction,
          normalize=True, scale=5.0)  # fmt: skip


@KINDS
def test_zero_rows_stay_zero(kind):
    with torch.no_grad():
        student, teacher = torch.randn(2, 20, 18), torch.randn(2, 20, 18)
        student[0, 3], student[1, :, 5], teacher[1, 2], teacher[0, :, 7] = 0, 0, 0, 0
    check(student.requires_grad_(), teacher, kind=kind, normalize=True)
    out = fastssl.self_relation_loss(student, teacher, kind=kind, normalize=True, backend="triton")
    grad = gradients(out, [student], torch.ones_like(out))[0]
    alone = grad[0, 3] if kind == "pixel" else grad[1, :, 5]
    assert torch.equal(alone, torch.zeros_like(alone))


# ---- hard rows -------------------------------------------------------------------------------------------------


@REDUCTIONS
@pytest.mark.parametrize(("length", "width", "temp"), [(37, 33, 0.25), (70, 33, 0.25), (37, 64, 0.25), (20, 384, 1.0)])
def test_rows_that_are_nearly_one_hot(reduction, length, width, temp):
    """P and Q are one at the diagonal, to 1e-2 … 1e-7: both terms of the loss, and P − Q, would cancel."""
    check(make(1, length, width), constant(1, length, width), reduction=reduction, student_temp=temp, teacher_temp=temp)


@pytest.mark.parametrize("others", [40, 80], ids=["together", "apart"])
@REDUCTIONS
def test_rows_that_are_nearly_one_hot_off_the_diagonal(others, reduction):
    """Each row is close to one of the columns, in student and teacher the same one."""
    columns = torch.randn(1, others, 32)
    nearest = torch.randperm(others)[:37]
    student, teacher = (torch.nn.functional.normalize(columns[:, nearest] + 0.1 * torch.randn(1, 37, 32), dim=-1)
                        for _ in range(2))  # fmt: skip
    columns = torch.nn.functional.normalize(columns, dim=-1)
    check(student.requires_grad_(), teacher, student_columns=columns.clone().requires_grad_(), teacher_columns=columns,
          scale=15.0, reduction=reduction)  # fmt: skip


@pytest.mark.parametrize("length", [30, 70], ids=["together", "apart"])
def test_symmetric_rows_that_are_nearly_one_hot_off_the_diagonal(length):
    """One long token is everybody's nearest."""
    direction = torch.nn.functional.normalize(torch.randn(16), dim=0)
    student, teacher = (direction + 0.05 * torch.randn(1, length, 16) for _ in range(2))
    student[:, 5] *= 12
    teacher[:, 5] *= 12
    check(student.requires_grad_(), teacher, scale=1.0)


def test_equal_tokens_share_the_largest_logit():
    """With two of each, no P is near one, and no logit alone is the largest."""
    student, teacher = torch.randn(1, 20, 24).repeat(1, 2, 1), torch.randn(1, 40, 24)
    check(student.requires_grad_(), teacher, student_temp=0.3)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("length", [20, 70], ids=["together", "apart"])
def test_logits_of_ten_thousand_stay_finite(size, length):
    student, teacher = make(1, length, 24), constant(1, length, 24)
    check(student, teacher, normalize=True, scale=size, tolerances=(FORWARD[torch.float32], LARGE_LOGITS))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@REDUCTIONS
def test_padding_cannot_overflow(reduction):
    """Beyond the last vector stand zeros, which beside logits of −1e4 are infinitely likely."""
    student, student_columns, teacher, teacher_columns = (torch.rand(1, 70, 16) for _ in range(4))
    columns = {"student_columns": student_columns.requires_grad_(), "teacher_columns": teacher_columns}
    tolerances = FORWARD[torch.float32], LARGE_LOGITS  # the teacher's are
    check(student.requires_grad_(), teacher, scale=-1e3, student_temp=1e3, reduction=reduction, tolerances=tolerances,
          **columns)  # fmt: skip


def test_the_student_of_itself():
    """The loss is the entropy, the gradient nothing but rounding."""
    x = make(1, 37, 33)
    out = fastssl.self_relation_loss(x, x.detach(), backend="triton")
    assert_close(out, reference(x.double(), x.double()), FORWARD[x.dtype])
    assert gradients(out, [x], torch.tensor(37.0))[0].abs().max() < 1e-6


# ---- strides ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "map": lambda: torch.randn(2, 24, 3, 5),
    "even map": lambda: torch.randn(2, 32, 4, 4),
    "channels last": lambda: torch.randn(2, 24, 3, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 24, 15).transpose(1, 2),
    "batch second": lambda: torch.randn(15, 2, 24).transpose(0, 1),
    "sliced": lambda: torch.randn(3, 17, 50)[1:, 1:, 7:31],
    "expanded": lambda: torch.randn(1, 15, 24).expand(2, -1, -1),
    "strided": lambda: torch.randn(2, 30, 48)[:, ::2, ::2],
}


@pytest.mark.parametrize(("kind", "reduction"), [("pixel", "mean"), ("pixel", "none"), ("channel", "none")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(kind, reduction, layout):
    student, teacher = LAYOUTS[layout]().requires_grad_(), LAYOUTS[layout]()
    check(student, teacher, kind=kind, num_heads=2, reduction=reduction)


@pytest.mark.parametrize("layout", ["map", "batch second"])
@pytest.mark.parametrize("normalize", [False, True])
@REDUCTIONS
def test_strides_too_long_for_offsets_of_32_bits(monkeypatch, layout, normalize, reduction):
    """Such tokens are copied, and so are gradients on their way back; here every stride above 14 is too long."""
    from fastssl.kernels import common, self_relation_loss_backward

    monkeypatch.setattr(common, "LONGEST_STRIDE", 14)
    monkeypatch.setattr(self_relation_loss_backward, "LONGEST_STRIDE", 14)
    upstream = torch.randn(2, 15, 2).transpose(1, 2) if reduction == "none" else None
    check(LAYOUTS[layout]().requires_grad_(), LAYOUTS[layout](), num_heads=2, normalize=normalize, upstream=upstream,
          reduction=reduction)  # fmt: skip


UPSTREAMS = {
    "contiguous": lambda *size: torch.randn(size),
    "from a scalar": lambda *size: torch.tensor(0.7).expand(size),
    "one per image": lambda *size: torch.randn(size[0], 1, 1).expand(size),
    "one per position": lambda *size: torch.randn(size[-1]).expand(size),
    "transposed": lambda *size: torch.randn(size[::-1]).permute(2, 1, 0),
    "strided": lambda *size: torch.randn(*size[:2], 2 * size[2])[..., ::2],
    "nothing": lambda *size: torch.zeros(size),
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("given", [False, True], ids=["symmetric", "columns"])
def test_weights_of_any_strides(upstream, given):
    columns = {"student_columns": make(2, 13, 32), "teacher_columns": constant(2, 13, 32)} if given else {}
    check(make(2, 11, 32), constant(2, 11, 32), num_heads=2, upstream=UPSTREAMS[upstream](2, 2, 11), reduction="none",
          **columns)  # fmt: skip
