"""gram_loss's Triton kernels under Triton's interpreter, against float64, in float32 and float16.

bfloat16 is left to tests/test_triton_compile.py and to machines with a GPU: see tests/test_triton_interpreter.py.
"""

import itertools

import pytest
import torch
from compare import assert_close, doubles, gradients
from tolerances import DIFFERENCES, FORWARD, GRADIENT

import fastssl
from fastssl import kernels
from fastssl.reference.gram_loss import gram_loss as reference

pytestmark = pytest.mark.skipif(
    kernels.why_not("cpu") is not None, reason=kernels.why_not("cpu") or "triton runs under its interpreter"
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
REMOVE = pytest.mark.parametrize("remove", ["none", "teacher", "both"])
NORMALIZE = pytest.mark.parametrize("normalize", [False, True])
PER_IMAGE = pytest.mark.parametrize("per_image", [True, False])


def make(*shape, dtype=torch.float32):
    """Tokens of length one on average."""
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_()


def constant(*shape, dtype=torch.float32):
    return make(*shape, dtype=dtype).detach()


def check(student, teacher, *, remove="none", tolerances=None, scaling=1.0, **kwargs):
    """Value and gradient of one call. tolerances: of the value and of the gradient; scaling: of the loss."""
    loss = fastssl.gram_loss(student, teacher, remove_negatives=remove, backend="triton", **kwargs)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    exact, exact_teacher = doubles([student, teacher])
    truth = reference(exact, exact_teacher, remove_negatives=remove, **kwargs)
    forward, gradient = tolerances or (max(table[t.dtype] for t in (student, teacher)) for table in (FORWARD, GRADIENT))
    # A loss below 1e-9 counts as nothing to assert_close.
    assert_close(loss * scaling, truth * scaling, forward, "loss")
    # Of the size of the gradient of a sum: the mean's is often below float16's smallest normal number.
    upstream = torch.tensor(scaling * max(student.numel(), 1))
    (got,) = gradients(loss, [student], upstream)
    (expected,) = gradients(truth, [exact], upstream.double())
    assert got.dtype == student.dtype
    assert_close(got, expected, gradient, "gradient")
    return loss


def run_forward(*arguments):
    return torch.ops.fastssl.gram_loss_forward_triton(*arguments)


def run_backward(*arguments):
    return torch.ops.fastssl.gram_loss_backward_triton(*arguments)


# ---- values and gradients --------------------------------------------------------------------------------------


@DTYPES
@REMOVE
@NORMALIZE
@pytest.mark.parametrize(("length", "width", "other"), [(1, 33, 33), (37, 33, 20), (60, 64, 64)])
def test_lengths_and_widths(dtype, remove, normalize, length, width, other):
    student = make(2, length, width, dtype=dtype)
    check(student, constant(2, length, other, dtype=dtype), remove=remove, normalize=normalize)


@DTYPES
@pytest.mark.parametrize(("length", "width"), [(197, 64), (300, 33)])
def test_larger(dtype, length, width):
    check(make(1, length, width, dtype=dtype), constant(1, length, width, dtype=dtype), remove="both")


@DTYPES
@pytest.mark.parametrize("width", [16, 70, 130, *(pytest.param(n, marks=pytest.mark.proof) for n in (300, 384))])
@pytest.mark.parametrize("length", [19, 70])
def test_depths(dtype, width, length):
    """One block of depth, several, and what is left over; the teacher's differs."""
    check(make(1, length, width, dtype=dtype), constant(1, length, 75, dtype=dtype), remove="teacher")


@DTYPES
@REMOVE
@NORMALIZE
def test_across_images(dtype, remove, normalize):
    student, teacher = make(3, 21, 24, dtype=dtype), constant(3, 21, 32, dtype=dtype)
    check(student, teacher, remove=remove, normalize=normalize, per_image=False)


@pytest.mark.parametrize(("mine", "other"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
@NORMALIZE
def test_a_teacher_of_another_dtype(mine, other, normalize):
    check(make(2, 23, 36, dtype=mine), constant(2, 23, 20, dtype=other), normalize=normalize, remove="both")


@NORMALIZE
@REMOVE
def test_zero_tokens(normalize, remove):
    student, teacher = constant(2, 20, 18), constant(2, 20, 18)
    student[0, 3], teacher[1, 2] = 0, 0
    check(student.requires_grad_(), teacher, normalize=normalize, remove=remove)
    loss = fastssl.gram_loss(student, teacher, remove_negatives=remove, backend="triton")
    assert not gradients(loss, [student], torch.ones(()))[0][0, 3].any()


@DTYPES
@pytest.mark.parametrize("remove", ["none", "both"])
@NORMALIZE
@pytest.mark.parametrize("length", [20, 70])
def test_of_equal_tokens_nothing_is_left(dtype, remove, normalize, length):
    student = make(2, length, 40, dtype=dtype)
    loss = fastssl.gram_loss(
        student, student.detach().clone(), remove_negatives=remove, normalize=normalize, backend="triton"
    )
    assert loss == 0
    assert not gradients(loss, [student], torch.ones(()))[0].any()


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_small_differences_in_float16(size):
    """S − T of some 1e-4: tokens rounded to float16 after their division by lengths would drown it."""
    student = (size * make(1, 70, 128).detach()).half()
    teacher = (student.float() * (1 + 2e-3 * torch.randn(1, 70, 128))).half()
    check(student.requires_grad_(), teacher, tolerances=(DIFFERENCES[1e-4], GRADIENT[torch.float16]))


def test_differences_below_the_numbers_of_float16():
    """S − T of some 1e-6, of which float16 keeps five bits, about as many as float32 sums leave of them."""
    student = make(1, 70, 128, dtype=torch.float16)
    teacher = student.detach().float() * (1 + 2e-5 * torch.randn(1, 70, 128))
    check(student, teacher, tolerances=(DIFFERENCES[1e-6], GRADIENT[torch.float16]), scaling=1e4)


# ---- strides ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "map": lambda: constant(2, 24, 3, 5),
    "even map": lambda: constant(2, 32, 4, 4),
    "channels last": lambda: constant(2, 24, 3, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: constant(2, 24, 15).transpose(1, 2),
    "batch second": lambda: constant(15, 2, 24).transpose(0, 1),
    "sliced": lambda: constant(3, 17, 50)[1:, 1:, 7:31],
    "expanded": lambda: constant(1, 15, 24).expand(2, -1, -1),
    "strided": lambda: constant(2, 30, 48)[:, ::2, ::2],
}


@PER_IMAGE
@NORMALIZE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, normalize, per_image):
    check(LAYOUTS[layout]().requires_grad_(), LAYOUTS[layout](), normalize=normalize, per_image=per_image)


@NORMALIZE
@pytest.mark.parametrize("layout", ["map", "batch second"])
def test_strides_too_long_for_offsets_of_32_bits(monkeypatch, layout, normalize):
    """Such tokens are copied, and so are gradients on their way back; here every stride above 14 is too long."""
    from fastssl.kernels import common

    monkeypatch.setattr(common, "LONGEST_STRIDE", 14)
    check(LAYOUTS[layout]().requires_grad_(), LAYOUTS[layout](), normalize=normalize)


# ---- raw operators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("remove", [0, 1, 2])
def test_the_gradient_of_the_forward_operator_is_that_of_the_backward(normalize, remove):
    arguments = (constant(2, 20, 24), constant(2, 20, 12), normalize, remove)
    loss, grad = run_forward(*arguments, 1)
    assert torch.equal(loss, run_forward(*arguments, 0)[0])
    assert run_forward(*arguments, 0)[1].shape == (0,)
    assert torch.equal(grad, run_backward(torch.ones(()), *arguments))
    torch.testing.assert_close(run_backward(torch.tensor(2.5), *arguments), 2.5 * grad)


def test_gradients_are_laid_out_like_their_tokens():
    student = constant(2, 12, 10).transpose(1, 2)
    assert run_backward(torch.ones(()), student, constant(2, 10, 12), 1, 0).stride() == student.stride()


@pytest.mark.parametrize("normalize", [0, 1])
def test_repeatable_and_leaves_its_inputs_alone(normalize):
    tensors = (torch.tensor(2.0), constant(2, 70, 20), constant(2, 70, 20))
    before = [t.clone() for t in tensors]
    results = [(*run_forward(*tensors[1:], normalize, 2, 1), run_backward(*tensors, normalize, 2)) for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(before, tensors, strict=True))


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("normalize", [0, 1])
def test_opcheck(batch, normalize):
    arguments = (constant(9, batch, 6).transpose(0, 1), constant(batch, 9, 8), normalize, 2)
    for wanted in (0, 1):
        torch.library.opcheck(torch.ops.fastssl.gram_loss_forward_triton, (*arguments, wanted))
    torch.library.opcheck(torch.ops.fastssl.gram_loss_backward_triton, (torch.tensor(0.5), *arguments))


@NORMALIZE
@PER_IMAGE
@pytest.mark.parametrize("shape", [(0, 7, 6), (2, 0, 6), (0, 0, 6), (0, 6, 3, 3)])
def test_a_mean_over_nothing_is_zero(normalize, per_image, shape):
    assert check(make(*shape), constant(*shape), normalize=normalize, per_image=per_image) == 0


# ---- the tables ------------------------------------------------------------------------------------------------


def test_every_block_size_is_compiled_by_the_proofs():
    """That is, whatever the tables choose is among the configurations, normalised or not."""
    from fastssl.kernels import gram_loss
    from fastssl.kernels.gram_loss import Traits, product_choice, squares_choice

    def key(choice):
        blocks = sorted((name, size) for name, size in choice.constexprs.items() if name != "NORMALIZE")
        return (choice.kernel.__name__, *blocks, choice.num_warps, choice.num_stages)

    configurations = list(gram_loss.configurations())
    assert len({c.description for c in configurations}) == len(configurations)
    sizes = (1, 16, 37, 48, 49, 64, 65, 100, 128, 129, 197, 256, 257, 384, 700, 1024)
    for exact, smooth in itertools.product((False, True), repeat=2):
        # The dtype is no constexpr: float32 configurations and others would look alike but for their descriptions.
        compiled = {key(c) for c in configurations if ("fp32" in c.description) == exact}
        traits = Traits(exact, smooth)
        for length in sizes:
            assert key(squares_choice(length, traits, 1)) in compiled
            for depth, other in itertools.product(sizes, repeat=2):
                assert key(product_choice(length, depth, other, traits, 1)) in compiled
