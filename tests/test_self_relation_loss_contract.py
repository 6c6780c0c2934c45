"""The contract around self_relation_loss: autograd, compilation, threads, bad input, and its module."""

import pytest
import torch
from compare import assert_close, gradients
from contract import (
    assert_refused,
    assert_same_bits_on_any_number_of_threads,
    leaves,
    make,
    needs_library,
    on_threads,
    tensors,
)
from tolerances import ONE_PASS

import fastssl
from fastssl import _library
from fastssl.nn import SelfRelationLoss

KINDS = pytest.mark.parametrize("kind", ["pixel", "channel"])
COLUMNS = pytest.mark.parametrize("columns", [False, True], ids=["symmetric", "columns"])


# ---- repeatability, autograd, compilation ----------------------------------------------------------------------


@needs_library
@KINDS
@COLUMNS
@pytest.mark.parametrize("shape", [(1, 97, 66), (9, 50, 66), (2, 420, 66)], ids=["few", "one-pass", "long"])
def test_same_bits_for_any_number_of_threads(cpu_path, kind, columns, shape):
    given = tensors(*shape, columns=shape[1] if columns else None)

    def run():
        results = []
        for reduction in ("mean", "none"):
            loss = fastssl.self_relation_loss(**given, kind=kind, num_heads=2, reduction=reduction, backend="cpp")
            upstream = torch.ones_like(loss) * torch.arange(1, loss.shape[-1] + 1 if loss.dim() else 2).sum(-1)
            results += [loss, *gradients(loss, leaves(given), upstream)]
        return results

    assert_same_bits_on_any_number_of_threads(run)


@needs_library
def test_the_mean_of_many_rows_has_the_same_bits_for_any_number_of_threads():
    """torch splits a sum of more than 32768 elements over threads: 75648 rows."""
    student, teacher = torch.randn(64, 197, 12), torch.randn(64, 197, 12)
    losses = on_threads(lambda: fastssl.self_relation_loss(student, teacher, num_heads=6, backend="cpp"), (1, 2, 3, 4))
    assert all(torch.equal(losses[0], other) for other in losses[1:])
    rows = fastssl.self_relation_loss(student, teacher, num_heads=6, reduction="none", backend="cpp")
    torch.testing.assert_close(losses[0], rows.double().mean().float())


@needs_library
@KINDS
@COLUMNS
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("batch", [2, 4], ids=["strips", "one-pass"])
def test_gradcheck(kind, columns, normalize, reduction, batch):
    others = (7 if kind == "pixel" else 5) if columns else None
    given = tensors(batch, 5, 6, others, dtype=torch.float64)

    def run(student, student_columns=None):
        changed = {**given, "student": student}
        if student_columns is not None:
            changed["student_columns"] = student_columns
        return fastssl.self_relation_loss(
            **changed, kind=kind, num_heads=2, normalize=normalize, reduction=reduction, backend="cpp"
        )

    assert torch.autograd.gradcheck(run, leaves(given))


@needs_library
@COLUMNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [0, 2, 5])
@pytest.mark.parametrize("channel", [0, 1])
def test_opcheck(columns, dtype, batch, channel):
    student = torch.randn(batch, 9, 6).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    teacher = torch.randn(batch, 9, 6)
    pair = (torch.randn(batch, 9, 6).to(dtype), torch.randn(batch, 9, 6)) if columns else (student, teacher)
    common = (student, teacher, *pair, channel, 2, 0.3, 0.6, 1, int(not columns))
    ops = torch.ops.fastssl
    for wanted in (0, 1, 2, 3) if columns else (0, 1):
        torch.library.opcheck(ops.self_relation_loss_forward, (*common, wanted))
    loss, stats, *_ = ops.self_relation_loss_forward(*common, 0)
    for wanted in (1, 2, 3) if columns else (1,):
        torch.library.opcheck(ops.self_relation_loss_backward, (torch.randn_like(loss), stats, *common, wanted))


@needs_library
def test_compiled_by_inductor_and_with_a_temperature_schedule():
    def step(student, teacher, temp):
        return fastssl.self_relation_loss(student + 1, teacher, kind="channel", num_heads=2, teacher_temp=temp) * 3

    compiled = torch.compile(step, fullgraph=True)
    student, teacher = make(4, 11, 8), torch.randn(4, 11, 8)
    for temp in (0.1, 0.2, 0.35):
        out, expected = compiled(student, teacher, temp), step(student, teacher, temp)
        torch.testing.assert_close(out, expected)
        upstream = torch.ones(())
        torch.testing.assert_close(gradients(out, [student], upstream), gradients(expected, [student], upstream))


@needs_library
@COLUMNS
def test_the_gradient_of_one_pass_is_that_of_two(cpu_path, columns):
    given = tensors(9, 210, 24, 215 if columns else None)
    mean = fastssl.self_relation_loss(**given, backend="cpp")
    rows = fastssl.self_relation_loss(**given, reduction="none", backend="cpp")
    assert_close(mean, rows.mean(), ONE_PASS)
    once = gradients(mean, leaves(given), torch.tensor(3.0))
    twice = gradients(rows, leaves(given), torch.full_like(rows, 3.0 / rows.numel()))
    for a, b in zip(once, twice, strict=True):
        assert_close(a, b, ONE_PASS)


@needs_library
def test_raw_operators_refuse_what_would_read_elsewhere():
    x = torch.randn(1, 5, 4)
    ops = torch.ops.fastssl
    common = (x, x, x, x, 0, 1, 0.5, 0.5, 0, 1)
    loss, stats, *_ = ops.self_relation_loss_forward(*common, 0)
    with pytest.raises(RuntimeError, match=r"weights must be \(B, H, R\)"):
        ops.self_relation_loss_backward(loss[..., :3], stats, *common, 1)
    with pytest.raises(RuntimeError, match="stats must be those of the forward"):
        ops.self_relation_loss_backward(loss, stats[:2], *common, 1)
    with pytest.raises(RuntimeError, match="have no gradient"):
        ops.self_relation_loss_backward(loss, stats, *common, 3)
    with pytest.raises(RuntimeError, match="the same batch, rows and columns"):
        ops.self_relation_loss_forward(x, x[:, :3], x, x[:, :3], 0, 1, 0.5, 0.5, 0, 0, 0)
    with pytest.raises(RuntimeError, match="must be the tokens themselves"):
        ops.self_relation_loss_forward(x, x, x[:, :3], x[:, :3], 0, 1, 0.5, 0.5, 0, 1, 0)


def test_the_docstring_equivalent_is_true():
    given = tensors(3, 9, 8, 11)
    p = fastssl.self_relation(given["student"], temp=0.5, columns=given["student_columns"], num_heads=2)
    q = fastssl.self_relation(given["teacher"], temp=0.2, columns=given["teacher_columns"], num_heads=2)
    expected = -(q.detach() * p.log()).sum(-1)
    for backend in ("reference", *(["cpp"] if _library.loaded() else [])):
        common = dict(**given, num_heads=2, student_temp=0.5, teacher_temp=0.2, backend=backend)
        torch.testing.assert_close(fastssl.self_relation_loss(**common, reduction="none"), expected)
        torch.testing.assert_close(fastssl.self_relation_loss(**common), expected.mean())


# ---- bad input -------------------------------------------------------------------------------------------------

X = torch.randn(2, 5, 6)
BAD = [
    (dict(student=[1.0]), TypeError, "student must be a Tensor, got list"),
    (dict(teacher=None), TypeError, "teacher must be a Tensor, got NoneType"),
    (dict(student=X[0]), ValueError, r"student must be \(B, N, C\) or \(B, C, h, w\), got \(5, 6\)"),
    (dict(teacher=X.long()), TypeError, "teacher must have dtype .*, got dtype int64"),
    (dict(teacher=X.to("meta")), ValueError, "teacher must be on the device of student .cpu., got meta"),
    (dict(teacher=X[:1]), ValueError, r"teacher must have student's batch \(B = 2\), got \(1, 5, 6\)"),
    (dict(teacher=X[:, :4]), ValueError, r"teacher must have student's number of tokens \(N = 5\) for kind='pixel'"),
    (dict(teacher=X[..., :3], kind="channel"), ValueError, r"teacher must have student's channels \(C = 6\) for kind"),
    (dict(num_heads=4), ValueError, "num_heads must divide the C channels of student, got 4 for C = 6"),
    (
        dict(teacher=torch.randn(2, 5, 4), num_heads=3),
        ValueError,
        "num_heads must divide the C channels of teacher, got 3 for C = 4",
    ),
    (dict(num_heads=0), ValueError, "num_heads must be an int of at least 1, got 0"),
    (dict(kind="token"), ValueError, "kind must be one of 'pixel', 'channel', got 'token'"),
    (dict(reduction="sum"), ValueError, "reduction must be one of 'mean', 'none', got 'sum'"),
    (dict(backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
    (dict(student_temp=0.0), ValueError, "student_temp must be a finite number greater than 0, got 0.0"),
    (dict(teacher_temp=float("nan")), ValueError, "teacher_temp must be a finite number greater than 0, got nan"),
    (dict(scale=float("inf")), ValueError, "scale must be a finite number, got inf"),
    (dict(scale=1e300, teacher_temp=1e-300), ValueError, "scale / teacher_temp must be a finite number, got"),
    (dict(normalize=1), TypeError, "normalize must be True or False, got int"),
    (dict(student_columns=X[:, :0]), ValueError, "student_columns must have at least one token"),
    (dict(student_columns=X[..., :3]), ValueError, "student_columns must have student's batch and channels"),
    (dict(teacher_columns=X[:1]), ValueError, "teacher_columns must have teacher's batch and channels"),
    (dict(student_columns=X[:, :3]), ValueError, r"teacher_columns must give as many columns .*\(M = 3\), got 5"),
    (
        dict(teacher_columns=X[:, :3], kind="channel"),
        ValueError,
        r"teacher_columns must have teacher's number of tokens",
    ),
    (dict(student_columns=X.int()), TypeError, "student_columns must have dtype"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_sentence(change, error, message):
    given = {"student": X, "teacher": X, **change}
    assert_refused("self_relation_loss", given, error, message)


# ---- the module ------------------------------------------------------------------------------------------------


@KINDS
def test_the_module_is_the_op(kind):
    student, teacher = make(2, 9, 8), torch.randn(2, 9, 8)
    criterion = SelfRelationLoss(kind, num_heads=2, student_temp=0.9, teacher_temp=0.3)
    expected = fastssl.self_relation_loss(student, teacher, kind=kind, num_heads=2, student_temp=0.9, teacher_temp=0.3)
    assert torch.equal(criterion(student, teacher), expected)
    assert list(criterion.state_dict()) == []
    assert "teacher_temp=0.3" in repr(criterion)


def test_the_module_aligns_by_sampling():
    """The relation sampled on both axes, rows on one grid and columns on the other, as SERE does it."""
    student, teacher = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 7, 7)
    grids = [torch.rand(2, k, k, 2) * 2.4 - 1.2 for k in (3, 4, 3, 4)]

    def sampled(x, rows, columns):
        heads = [0.5 * torch.einsum("bchw,bcij->bhwij", m, m) for m in (x[:, :4], x[:, 4:])]  # d = 4
        out = []
        for logits in heads:
            b, h, w, i, j = logits.shape
            one = torch.nn.functional.grid_sample(
                logits.reshape(b, h * w, i, j), columns, align_corners=False
            )  # (b, hw, k, k)
            two = torch.nn.functional.grid_sample(
                one.flatten(2).transpose(1, 2).reshape(b, -1, h, w), rows, align_corners=False
            )
            out.append(two.flatten(2).transpose(1, 2))
        return torch.stack(out, 1)

    p = sampled(student, grids[0], grids[1]).log_softmax(-1)
    q = (sampled(teacher, grids[2], grids[3]) / 0.5).softmax(-1)
    criterion = SelfRelationLoss("pixel", num_heads=2, student_temp=1.0, teacher_temp=0.5)
    got = criterion(student, teacher, student_grids=(grids[0], grids[1]), teacher_grids=(grids[2], grids[3]))
    torch.testing.assert_close(got, -(q * p).sum(-1).mean())


def test_the_module_has_the_published_temperatures():
    assert (SelfRelationLoss("pixel").teacher_temp, SelfRelationLoss("channel").teacher_temp) == (0.5, 0.1)


def test_the_module_refuses_grids_of_one_side():
    criterion = SelfRelationLoss("pixel")
    grid = torch.zeros(2, 3, 3, 2)
    with pytest.raises(ValueError, match="SelfRelationLoss: student_grids and teacher_grids must be given together"):
        criterion(torch.randn(2, 9, 4), torch.randn(2, 9, 4), student_grids=(grid, grid))
    with pytest.raises(TypeError, match="SelfRelationLoss: teacher_grids must be a pair of grids"):
        criterion(torch.randn(2, 9, 4), torch.randn(2, 9, 4), student_grids=(grid, grid), teacher_grids=grid)
    with pytest.raises(ValueError, match="SelfRelationLoss: grids are for kind='pixel', got 'channel'"):
        SelfRelationLoss("channel")(
            torch.randn(2, 9, 4), torch.randn(2, 9, 4), student_grids=(grid, grid), teacher_grids=(grid, grid)
        )
