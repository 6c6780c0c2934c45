"""The raw operators of self_relation_loss's Triton kernels under the interpreter: what is asked for, how it is made.

"Together" is loss and gradient in one launch, "apart" in two.
"""

import pytest
import torch
from compare import assert_close, doubles, gradients
from relation_loss_triton import (
    DTYPES,
    KINDS,
    REDUCTIONS,
    check,
    constant,
    launched,
    make,
    needs_interpreter,
    numbers,
    run_backward,
    run_forward,
)
from tolerances import GRADIENT, ONE_LAUNCH

from fastssl.reference.self_relation_loss import self_relation_loss as reference

pytestmark = needs_interpreter

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
            assert_close(other, one, ONE_LAUNCH[dtype])


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
