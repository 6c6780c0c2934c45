"""self_relation_loss against its float64 reference, on every code path of the CPU and on a GPU."""

import itertools
import math
from functools import partial

import pytest
import torch
from compare import assert_close, doubles, gradients, relative_error
from tolerances import FORWARD, GRADIENT, OFF_THE_DIAGONAL, of_logits

import fastssl
from fastssl import _library
from fastssl.reference.self_relation_loss import self_relation_loss as reference

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(not _library.loaded(), reason=_library.why_not or "")
KINDS = pytest.mark.parametrize("kind", ["pixel", "channel"])


def make(*shape, dtype=torch.float32, device="cpu", grad=True):
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def teacher_like(student, width=None, mix=0.5):
    """A teacher that is partly the student, as in training; of another width where asked."""
    other = torch.randn_like(student, dtype=torch.float32)
    teacher = mix * student.detach().float() + (1 - mix) * other
    return (teacher if width is None else torch.randn(*student.shape[:2], width)).to(student.dtype)


def check(student, teacher, columns=(None, None), *, gradient=None, largest=0.0, reduction=None, **kwargs):
    """Value and gradients of one call against float64; both reductions if none is named. largest: of the logits."""
    if reduction is None:
        both = partial(check, student, teacher, columns, gradient=gradient, largest=largest, **kwargs)
        both(reduction="none")
        return both(reduction="mean")
    backend = kwargs.pop("backend", "cpp")
    names = ("student", "teacher", "student_columns", "teacher_columns")
    tensors = dict(zip(names, (student, teacher, *columns), strict=True))
    exact = dict(zip(names, doubles(tensors.values()), strict=True))
    given = {n: t for n, t in tensors.items() if t is not None}
    loss = fastssl.self_relation_loss(**given, reduction=reduction, backend=backend, **kwargs)
    truth = reference(**{n: t for n, t in exact.items() if t is not None}, reduction=reduction, **kwargs)
    double = any(t.dtype == torch.float64 for t in given.values())
    assert loss.dtype == (torch.float64 if double else torch.float32)
    # Losses are float32 whatever the inputs: these were rounded before float64 saw them.
    assert_close(loss, truth, FORWARD[loss.dtype] if double else of_logits(largest), f"{reduction} loss")
    upstream = torch.randn(loss.shape, dtype=loss.dtype, device=loss.device)
    leaves = [student, columns[0]]
    got = gradients(loss, leaves, upstream)
    expected = gradients(truth, [exact["student"], exact["student_columns"]], upstream.cpu().double())
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    for g, e, leaf in zip(got, expected, wanted, strict=True):
        assert g.dtype == leaf.dtype
        # A float64 gradient of a float32 leaf is rounded to it, and so on.
        assert_close(g, e, gradient or GRADIENT[leaf.dtype], f"gradient of {reduction} loss")
    return loss


# ---- values and gradients --------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("length", [1, 37, 197, 700])
@pytest.mark.parametrize(("width", "heads"), [(33, 1), (33, 3), (384, 1), (384, 3), (384, 6)])
@pytest.mark.parametrize("temps", [(1.0, 0.5), (0.1, 0.05)], ids=["warm", "cold"])
def test_float32(cpu_path, kind, length, width, heads, temps):
    batch = -(-8 // heads) if length < 700 else 2  # as many heads as one pass needs
    student = make(batch, length, width)
    rows = student.detach().unflatten(-1, (heads, -1))
    lengths = rows.square().sum(-1 if kind == "pixel" else 1)
    scale = rows.shape[-1] ** -0.5 if kind == "pixel" else 1 / length
    check(
        student,
        teacher_like(student),
        kind=kind,
        num_heads=heads,
        student_temp=temps[0],
        teacher_temp=temps[1],
        largest=float(lengths.max()) * scale / temps[0],
    )


@KINDS
@pytest.mark.parametrize("length", [1, 37, 1024])
def test_few_heads(cpu_path, kind, length):
    """Too few to give each core its own, or too long to stay in cache: strips of rows, in two passes."""
    student = make(1, length, 66)
    check(student, teacher_like(student), kind=kind, num_heads=3)


@KINDS
@pytest.mark.parametrize("batch", [1, 4])
def test_student_and_teacher_of_different_shape(cpu_path, kind, batch):
    student = make(batch, 37, 66)
    teacher = torch.randn(batch, 37, 96) if kind == "pixel" else torch.randn(batch, 50, 66)
    check(student, teacher, kind=kind, num_heads=3, student_temp=0.5)


@KINDS
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("wanted", ["both", "student", "columns"])
def test_columns(cpu_path, kind, batch, normalize, wanted):
    others = 37 if kind == "channel" else 50
    student, columns = make(batch, 37, 66, grad=wanted != "columns"), make(batch, others, 66, grad=wanted != "student")
    teacher = teacher_like(student), teacher_like(columns)
    scale = 5.0 if normalize else None
    check(student, teacher[0], (columns, teacher[1]), kind=kind, num_heads=3, normalize=normalize, scale=scale)


@needs_library
def test_columns_of_one_side_alone():
    """The other side relates its rows to themselves; the gradient of the student comes on two ways."""
    student, others = make(3, 20, 24), torch.randn(3, 20, 24)
    check(student, torch.randn(3, 20, 24), (None, others), num_heads=3)
    check(student, torch.randn(3, 20, 24), (make(3, 20, 24), None), num_heads=3)


@KINDS
@pytest.mark.parametrize("shape", [(4, 37, 66), (1, 300, 33)])
def test_normalize(cpu_path, kind, shape):
    """A scale that tells rows apart; test_error_at_most_twice_that_of_plain_pytorch has the others."""
    student = make(*shape)
    check(student, teacher_like(student), kind=kind, num_heads=3, normalize=True, scale=5.0, teacher_temp=0.5)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@KINDS
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("normalize", [False, True])
def test_dtypes(cpu_path, dtype, kind, batch, normalize):
    student = make(batch, 37, 66, dtype=dtype)
    scale = 5.0 if normalize else None
    check(student, teacher_like(student), kind=kind, num_heads=3, normalize=normalize, scale=scale)


@needs_library
@pytest.mark.parametrize(("dtype", "other"), list(itertools.permutations(DTYPES, 2)))
def test_mixed_dtypes(dtype, other):
    check(make(3, 19, 33, dtype=dtype), make(3, 19, 33, dtype=other, grad=False), num_heads=3)


@needs_library
@pytest.mark.parametrize("batch", [1, 4])
def test_scales_of_either_sign(cpu_path, batch):
    student = make(batch, 41, 24)
    check(student, teacher_like(student), num_heads=2, scale=-0.3, student_temp=0.5)
    check(student, teacher_like(student), num_heads=2, scale=0.4, teacher_temp=0.2)


LAYOUTS = {
    "map": lambda: torch.randn(4, 24, 5, 7),
    "channels_last": lambda: torch.randn(4, 24, 5, 7).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(4, 24, 35).transpose(1, 2),
    "sliced": lambda: torch.randn(5, 37, 50)[1:, 1:-1, 7:31],
    "expanded": lambda: torch.randn(1, 35, 24).expand(4, -1, -1),
    "strided": lambda: torch.randn(4, 70, 48)[:, ::2, ::2],
}


@needs_library
@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("few", [False, True], ids=["one-pass", "strips"])
def test_any_strides(cpu_path, kind, layout, few):
    student, teacher = LAYOUTS[layout](), LAYOUTS[layout]()
    if few:
        student, teacher = student[:2], teacher[:2]
    check(student.requires_grad_(), teacher, kind=kind, num_heads=2)


@needs_library
@KINDS
@pytest.mark.parametrize("shape", [(0, 5, 8), (1, 1, 1), (1, 5, 8), (9, 1, 1)])
def test_empty_and_tiny(kind, shape):
    loss = check(make(*shape), torch.randn(shape), kind=kind)
    assert loss.shape == ()


@needs_library
@KINDS
def test_no_tokens(kind):
    student = make(2, 0, 6)
    loss = fastssl.self_relation_loss(student, torch.randn(2, 0, 6), kind=kind, backend="cpp")
    assert loss.detach() == (0 if kind == "pixel" else pytest.approx(math.log(6)))
    assert gradients(loss, [student], torch.ones(()))[0].shape == (2, 0, 6)


# ---- hard rows -------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("given", [False, True], ids=["symmetric", "columns"])
def test_rows_that_are_nearly_one_hot(cpu_path, batch, given):
    """A loss of 1e-4, all of it in what is left beside the pivot: plain float32 is off by several percent."""
    student = make(batch, 37, 384)
    teacher = teacher_like(student, mix=0.9)
    columns = (student.detach().clone().requires_grad_(), teacher.clone()) if given else (None, None)
    loss = check(student, teacher, columns, largest=float(student.detach().square().sum(-1).max()) * 384**-0.5)
    assert loss < 1e-3


@needs_library
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("given", [False, True], ids=["symmetric", "columns"])
def test_rows_that_are_nearly_one_hot_off_the_diagonal(cpu_path, batch, given):
    """Pairs of parallel tokens: each shorter one relates to its longer twin, whose logit is 7 above its own."""
    directions = torch.nn.functional.normalize(torch.randn(batch, 4, 16), dim=-1)
    student = torch.cat([12.0 * directions, 12.6 * directions], 1).requires_grad_()
    teacher = 1.02 * student.detach()
    columns = (student.detach().clone().requires_grad_(), teacher.clone()) if given else (None, None)
    loss = check(student, teacher, columns, scale=1.0, largest=12.6**2, gradient=OFF_THE_DIAGONAL)
    assert loss < 1e-2


@needs_library
@pytest.mark.parametrize("scale", [1e-45, 1e-41, 0.0])
def test_the_smallest_scales_make_no_nan(scale):
    student = make(9, 6, 8)
    for reduction in ("mean", "none"):
        loss = fastssl.self_relation_loss(
            student, torch.randn(9, 6, 8), scale=scale, reduction=reduction, backend="cpp"
        )
        assert torch.isfinite(gradients(loss, [student], torch.ones_like(loss))[0]).all()


@needs_library
@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_need_their_own_maximum(cpu_path, batch, dtype):
    """Lengths from 0.01 to 30: one shift for all rows would lose the short ones."""
    student = torch.randn(batch, 67, 32) * torch.logspace(-2, 1.5, 67)[:, None]
    teacher = (student + 0.1 * torch.randn_like(student)).to(dtype)
    check(student.to(dtype).requires_grad_(), teacher, num_heads=2)


@needs_library
@KINDS
@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_stay_finite(cpu_path, kind, batch, dtype):
    student = (100 * torch.randn(batch, 37, 16)).to(dtype).requires_grad_()
    teacher = (100 * torch.randn(batch, 37, 16)).to(dtype)
    columns = (student.detach().roll(1, 1).clone().requires_grad_(), teacher.roll(1, 1).clone())
    for pair in ((None, None), columns):
        for reduction in ("mean", "none"):
            loss = fastssl.self_relation_loss(
                student,
                teacher,
                kind=kind,
                scale=1.0,
                reduction=reduction,
                student_columns=pair[0],
                teacher_columns=pair[1],
                backend="cpp",
            )
            truth = reference(
                student.double(),
                teacher.double(),
                kind=kind,
                scale=1.0,
                reduction=reduction,
                student_columns=None if pair[0] is None else pair[0].double(),
                teacher_columns=None if pair[1] is None else pair[1].double(),
            )
            assert torch.isfinite(loss).all()
            assert_close(loss, truth, FORWARD[torch.float32])
            leaves = [student, pair[0]]
            assert all(torch.isfinite(g).all() for g in gradients(loss, leaves, torch.ones_like(loss)))


@needs_library
@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_not_hidden(cpu_path, batch, where, value):
    tensors = {"student": torch.randn(batch, 20, 8), "teacher": torch.randn(batch, 20, 8)}
    tensors[where][0, 3, 2] = value
    rows = fastssl.self_relation_loss(**tensors, reduction="none", backend="cpp")
    assert torch.isnan(rows[0, 0, 3])
    assert torch.isfinite(rows[1:]).all()
    assert torch.isnan(fastssl.self_relation_loss(**tensors, backend="cpp"))


@needs_library
def test_zero_vectors_get_no_gradient():
    student = torch.randn(4, 12, 8)
    student[:, 4] = 0
    student.requires_grad_()
    check(student, torch.randn(4, 12, 8), num_heads=2, normalize=True, scale=5.0)
    loss = fastssl.self_relation_loss(student, torch.randn(4, 12, 8), num_heads=2, normalize=True)
    assert (gradients(loss, [student], torch.ones(()))[0][:, 4] == 0).all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@KINDS
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("batch", [1, 6])
def test_error_at_most_twice_that_of_plain_pytorch(dtype, kind, normalize, batch):
    """The same formula in plain PyTorch in the same dtype; where all rows are nearly alike, P − Q cancels in both."""

    def plain(student, teacher):
        def logits(x, temp):
            rows = x.unflatten(-1, (2, 32)).permute((0, 2, 1, 3) if kind == "pixel" else (0, 2, 3, 1))
            rows = torch.nn.functional.normalize(rows, dim=-1) if normalize else rows
            factor = (32**-0.5 if kind == "pixel" else 1 / 97) / temp
            return factor * (rows @ rows.transpose(-1, -2))

        target = logits(teacher, 0.5).softmax(-1)
        return -(target * logits(student, 1.0).log_softmax(-1)).sum(-1).mean()

    student = make(batch, 97, 64, dtype=dtype)
    teacher = teacher_like(student)
    exact, exact_teacher = doubles([student, teacher])
    ours = fastssl.self_relation_loss(
        student, teacher, kind=kind, num_heads=2, normalize=normalize, teacher_temp=0.5, backend="cpp"
    )
    theirs, truth = plain(student, teacher), plain(exact, exact_teacher)
    floor = torch.finfo(dtype).eps  # below one unit in the last place there is nothing to compare
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + floor
    (expected,) = gradients(truth, [exact], torch.ones((), dtype=torch.float64))
    mine, plains = (
        relative_error(gradients(loss, [student], torch.ones_like(loss))[0], expected) for loss in (ours, theirs)
    )
    assert mine <= 2 * plains + floor


# ---- on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@KINDS
@pytest.mark.parametrize("length", [1, 37, 197, 300, 700])
@pytest.mark.parametrize(("width", "heads"), [(33, 1), (384, 6), (384, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_triton_on_gpu(kind, length, width, heads, dtype, normalize):
    student = make(2, length, width, dtype=dtype, device="cuda")
    # A scale that leaves rows unsaturated: half-precision gradients of one-hot rows are rounding alone.
    scale = 5.0 if normalize else None if kind == "channel" else heads / width
    check(
        student,
        teacher_like(student),
        kind=kind,
        num_heads=heads,
        normalize=normalize,
        scale=scale,
        teacher_temp=0.5,
        backend="triton",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["columns", "map"])
def test_triton_on_gpu_layouts(dtype, layout):
    shape = (2, 24, 5, 7) if layout == "map" else (2, 35, 24)
    student = make(*shape, dtype=dtype, device="cuda")
    columns = (None, None)
    if layout == "columns":
        others = make(2, 50, 24, dtype=dtype, device="cuda")
        columns = (others, teacher_like(others))
    check(student, teacher_like(student), columns, num_heads=3, backend="triton")
