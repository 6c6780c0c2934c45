"""self_relation_loss's Triton kernels under Triton's interpreter, against float64, in float32 and float16.

bfloat16 is left to tests/test_triton_compile.py and to machines with a GPU, but for products of two dtypes, which are
made in float32: see tests/test_triton_interpreter.py. "Together" is loss and gradient in one launch, "apart" in two.
"""

import pytest
import torch
from compare import assert_close, doubles, gradients
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl import kernels
from fastssl.reference.self_relation_loss import self_relation_loss as reference

pytestmark = pytest.mark.skipif(
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

    names = []
    for module in (self_relation_loss, self_relation_loss_backward):
        launch = module.launch

        def spy(choice, *arguments, launch=launch):
            names.append(choice.kernel.__name__)
            launch(choice, *arguments)

        monkeypatch.setattr(module, "launch", spy)
    return names


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
    # float32 keeps such logits to ±1e-3, which becomes the relative error of each share.
    check(student, teacher, normalize=True, scale=size, tolerances=(1e-2, 1e-1))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@REDUCTIONS
def test_padding_cannot_overflow(reduction):
    """Beyond the last vector stand zeros, which beside logits of −1e4 are infinitely likely."""
    student, student_columns, teacher, teacher_columns = (torch.rand(1, 70, 16) for _ in range(4))
    columns = {"student_columns": student_columns.requires_grad_(), "teacher_columns": teacher_columns}
    # Gradients of a teacher with such logits: see above.
    check(student.requires_grad_(), teacher, scale=-1e3, student_temp=1e3, reduction=reduction, tolerances=(1e-2, 1e-1),
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


# ---- raw operators: what is asked for, and how it is computed --------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "pixel"), (torch.float32, "channel"), (torch.float16, "pixel")]
)
@pytest.mark.parametrize(("given", "normalize"), [(False, False), (True, False), (False, True)])
def test_the_gradient_is_the_same_together_and_apart(dtype, kind, given, normalize, monkeypatch):
    from fastssl.kernels import self_relation_loss

    tensors = [torch.randn(1, 18, 20, dtype=dtype) for _ in range(4 if given else 2)]
    arguments = numbers(*tensors, kind=kind, heads=1, scale=1.0, normalize=normalize)
    wanted = 3 if given else 1
    products = ["loss_product"] * (2 if given else 1)
    names = launched(monkeypatch)
    loss, stats, *together = run_forward(*arguments, wanted)
    assert names == ["loss_and_gradient"]
    share = torch.tensor(1 / loss.numel()).expand(loss.shape)
    backward = run_backward(share, stats, *arguments, wanted)
    assert names == ["loss_and_gradient", *products]
    one_by_one = run_backward(share.contiguous(), stats, *arguments, wanted)
    monkeypatch.setattr(self_relation_loss, "ONE_PROGRAM", 0)
    del names[:]
    apart = run_forward(*arguments, wanted)
    assert names == ["loss_rows", *products]
    for one, another in ((loss, apart[0]), (stats, apart[1])):
        torch.testing.assert_close(one, another, rtol=1e-6, atol=1e-6)
    for one, *others in zip(together, backward, one_by_one, apart[2:], strict=True):
        for other in others:
            assert_close(other, one, 2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
@pytest.mark.parametrize(("others", "normalize"), [(5, False), (50, False), (5, True)])
def test_only_wanted_gradients_are_computed(wanted, others, normalize, monkeypatch):
    tensors = (torch.randn(1, 9, 6), torch.randn(1, 9, 8), torch.randn(1, others, 6).half(), torch.randn(1, others, 8))
    arguments = numbers(*tensors, normalize=normalize)
    loss, stats, *everything = run_forward(*arguments, 3)
    names = launched(monkeypatch)
    parts = run_forward(*arguments, wanted)[2:]
    assert len(names) == (1 if others == 5 else 1 + (wanted & 1) + (wanted >> 1))
    weights = torch.randn(loss.shape)
    weighted, weighted_parts = (run_backward(weights, stats, *arguments, bits) for bits in (3, wanted))
    for some, all_ in ((parts, everything), (weighted_parts, weighted)):
        for bit, tokens in ((0, tensors[0]), (1, tensors[2])):
            assert some[bit].dtype == tokens.dtype
            assert torch.equal(some[bit], all_[bit]) if wanted >> bit & 1 else some[bit].shape == (0,)


@pytest.mark.parametrize("length", [37, 70], ids=["together", "apart"])
def test_symmetric_relations_have_one_gradient(length):
    arguments = numbers(torch.randn(1, length, 6), torch.randn(1, length, 6))
    loss, stats, whole, nothing = run_forward(*arguments, 3)
    assert torch.equal(whole, run_forward(*arguments, 1)[2])
    assert torch.equal(nothing, torch.zeros_like(nothing))
    whole, nothing = run_backward(torch.ones_like(loss), stats, *arguments, 3)
    assert torch.equal(whole, run_backward(torch.ones_like(loss), stats, *arguments, 1)[0])
    assert torch.equal(nothing, torch.zeros_like(nothing))


@DTYPES
@pytest.mark.parametrize(("length", "width"), [(40, 24), (60, 16)])
def test_the_gradient_of_the_forward_operator(dtype, length, width):
    """With small and with large blocks, and in float16, for which the public function has it made in backward."""
    student, teacher = make(1, length, width, dtype=dtype), constant(1, length, width, dtype=dtype)
    grad = run_forward(*numbers(student, teacher), 1)[2]
    student64, teacher64 = doubles([student, teacher])
    truth = reference(student64, teacher64, scale=0.3, teacher_temp=1 / 1.5)
    # Multiplied by the number of rows: much of float16's gradient is below its smallest normal number.
    factor = length if dtype == torch.float32 else 1
    expected = gradients(truth, [student64], torch.tensor(float(factor), dtype=torch.float64))[0]
    assert_close(grad * factor, expected, GRADIENT[dtype], "gradient")


def test_gradients_are_laid_out_like_their_tokens():
    student = torch.randn(2, 12, 10).transpose(1, 2)
    arguments = numbers(student, torch.randn(2, 10, 12))
    loss, stats, grad, _ = run_forward(*arguments, 1)
    assert grad.stride() == student.stride()
    assert run_backward(torch.ones_like(loss), stats, *arguments, 1)[0].stride() == student.stride()


@pytest.mark.parametrize("length", [16, 50], ids=["together", "apart"])
@pytest.mark.parametrize("normalize", [False, True])
def test_repeatable_and_leaves_its_inputs_alone(length, normalize):
    tensors = [torch.randn(1, length, 6) for _ in range(4)]
    arguments = numbers(*tensors, normalize=normalize)
    weights = torch.randn(1, 1, length)
    before = [t.clone() for t in (*tensors, weights)]
    first, second = run_forward(*arguments, 3), run_forward(*arguments, 3)
    stats = first[1].clone()
    first, second = ((*some, *run_backward(weights, some[1], *arguments, 3)) for some in (first, second))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(b, t) for b, t in zip((*before, stats), (*tensors, weights, first[1]), strict=True))


# ---- sizes of nothing ------------------------------------------------------------------------------------------


@KINDS
@REDUCTIONS
@pytest.mark.parametrize("normalize", [False, True])
def test_empty_batch(kind, reduction, normalize):
    out = check(make(0, 7, 6), constant(0, 7, 6), kind=kind, reduction=reduction, normalize=normalize)
    assert out.numel() == (0 if reduction == "none" else 1)


@REDUCTIONS
@pytest.mark.parametrize("normalize", [False, True])
def test_no_tokens(reduction, normalize):
    check(make(2, 0, 6), constant(2, 0, 6), reduction=reduction, normalize=normalize)
    columns = {"student_columns": make(2, 5, 6), "teacher_columns": constant(2, 5, 6)}
    check(make(2, 0, 6), constant(2, 0, 6), reduction=reduction, normalize=normalize, **columns)
    uniform = check(make(2, 0, 6), constant(2, 0, 6), kind="channel", reduction="none", normalize=normalize)
    torch.testing.assert_close(uniform, torch.full((2, 1, 6), 6.0).log())


# ---- the tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True], ids=["16-bit", "float32"])
@pytest.mark.parametrize("smooth", [False, True], ids=["no-vectors", "vectors"])
def test_every_block_size_is_compiled_by_the_proofs(exact, smooth):
    """That is, whatever the tables choose is among the configurations."""
    from fastssl.kernels import self_relation_loss, self_relation_loss_backward
    from fastssl.kernels.self_relation_loss_backward import Traits, product_choice

    def key(choice):
        return (choice.kernel.__name__, *sorted(choice.constexprs.items()), choice.num_warps, choice.num_stages)

    # The dtype is no constexpr: float32 configurations and others would look alike but for their descriptions.
    modules = (self_relation_loss, self_relation_loss_backward)
    compiled = {key(c) for m in modules for c in m.configurations() if ("fp32" in c.description) == exact}
    sizes = (1, 16, 37, 48, 49, 64, 65, 100, 128, 129, 197, 256, 257, 300, 384, 512, 700)
    for depth in (0, *sizes):
        for along in (False, True):
            traits = Traits(depth, exact, smooth, along)
            for size in sizes:
                assert key(self_relation_loss.rows_choice(size, traits)) in compiled
                together = self_relation_loss.together_choice(size, size, traits, True, 1)
                assert together is None or key(together) in compiled
                together = self_relation_loss.together_choice(size, size, traits, False, 3)
                assert together is None or key(together) in compiled
                for direct, transposed in ((True, False), (False, True), (True, True)):
                    for own in {depth, depth // 2}:
                        choice = product_choice(size, own, traits, direct, transposed, 1)
                        assert key(choice) in compiled
