"""gram_loss against its float64 reference, on every code path of the CPU and on a GPU."""

import itertools

import pytest
import torch
from compare import assert_close, doubles, gradients, relative_error
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl import _library
from fastssl.reference.gram_loss import gram_loss as reference

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(not _library.loaded(), reason=_library.why_not or "")
REMOVE = pytest.mark.parametrize("remove", ["none", "teacher", "both"])
NORMALIZE = pytest.mark.parametrize("normalize", [False, True])


def make(*shape, dtype=torch.float32, device="cpu", grad=True):
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def teacher_like(student, mix=0.5):
    """A teacher that is partly the student, as in training."""
    return (mix * student.detach().float() + (1 - mix) * torch.randn_like(student, dtype=torch.float32)).to(
        student.dtype
    )


def check(student, teacher, *, backend="cpp", remove="none", tolerances=None, **kwargs):
    """Value and gradient of one call against float64."""
    loss = fastssl.gram_loss(student, teacher, remove_negatives=remove, backend=backend, **kwargs)
    exact, exact_teacher = doubles([student, teacher])
    truth = reference(exact, exact_teacher, remove_negatives=remove, **kwargs)
    double = torch.float64 in (student.dtype, teacher.dtype)
    assert loss.dtype == (torch.float64 if double else torch.float32)
    assert loss.shape == ()
    # Losses are float32 whatever the inputs: these were rounded before float64 saw them.
    forward, gradient = tolerances or (FORWARD[loss.dtype], GRADIENT[student.dtype])
    assert_close(loss, truth, forward, "loss")
    # Of the size of the gradient of a sum: the mean's is often below float16's smallest normal number.
    upstream = torch.tensor(float(max(student.numel(), 1)), dtype=loss.dtype, device=loss.device)
    (got,) = gradients(loss, [student], upstream)
    (expected,) = gradients(truth, [exact], upstream.cpu().double())
    assert got.dtype == student.dtype
    assert_close(got, expected, gradient, "gradient")
    return loss


# ---- values and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 37, 197, 700])
@pytest.mark.parametrize(("width", "other"), [(33, 33), (384, 384), (33, 384), (384, 48)])
@REMOVE
@NORMALIZE
def test_float32(cpu_path, length, width, other, remove, normalize):
    batch = 8 if length < 700 else 1  # as many images as one pass needs
    student = make(batch, length, width)
    teacher = teacher_like(student) if width == other else torch.randn(batch, length, other)
    check(student, teacher, remove=remove, normalize=normalize)


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 37, 33), (2, 197, 66), (3, 50, 16), (9, 3, 2), (8, 404, 3)])
@REMOVE
@NORMALIZE
@pytest.mark.parametrize("per_image", [True, False])
def test_few_images_and_whole_batches(cpu_path, shape, remove, normalize, per_image):
    """Too few to give each core its own image: groups of strips of rows, in two passes."""
    student = make(*shape)
    check(student, teacher_like(student), remove=remove, normalize=normalize, per_image=per_image)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [2, 9], ids=["two-pass", "one-pass"])
@REMOVE
@NORMALIZE
def test_dtypes(cpu_path, dtype, batch, remove, normalize):
    student = make(batch, 37, 66, dtype=dtype)
    check(student, teacher_like(student), remove=remove, normalize=normalize)


@needs_library
@pytest.mark.parametrize(("dtype", "other"), list(itertools.permutations(DTYPES, 2)))
@pytest.mark.parametrize("batch", [2, 9], ids=["two-pass", "one-pass"])
def test_mixed_dtypes(dtype, other, batch):
    check(make(batch, 19, 33, dtype=dtype), make(batch, 19, 48, dtype=other, grad=False), remove="both")


LAYOUTS = {
    "map": lambda: torch.randn(9, 24, 5, 7),
    "channels_last": lambda: torch.randn(9, 24, 5, 7).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(9, 24, 35).transpose(1, 2),
    "sliced": lambda: torch.randn(10, 37, 50)[1:, 1:-1, 7:31],
    "expanded": lambda: torch.randn(1, 35, 24).expand(9, -1, -1),
    "strided": lambda: torch.randn(9, 70, 48)[:, ::2, ::2],
    "batch second": lambda: torch.randn(35, 9, 24).transpose(0, 1),
}


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("few", [False, True], ids=["one-pass", "two-pass"])
@pytest.mark.parametrize("per_image", [True, False])
def test_any_strides(cpu_path, layout, few, per_image):
    student, teacher = LAYOUTS[layout](), LAYOUTS[layout]()
    if few:
        student, teacher = student[:2], teacher[:2]
    check(student.requires_grad_(), teacher, remove="teacher", per_image=per_image)
    check(student, torch.randn(student.shape[0], 35, 11), normalize=False, per_image=per_image)


@needs_library
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (9, 0, 8), (0, 0, 8), (0, 8, 3, 3)])
@pytest.mark.parametrize("per_image", [True, False])
def test_a_mean_over_nothing_is_zero(shape, per_image):
    student, teacher = make(*shape), torch.randn(shape)
    assert check(student, teacher, per_image=per_image) == 0
    loss = fastssl.gram_loss(student, teacher, per_image=per_image, backend="cpp")
    assert gradients(loss, [student], torch.ones(()))[0].shape == shape


@needs_library
@pytest.mark.parametrize("batch", [2, 9], ids=["two-pass", "one-pass"])
@REMOVE
def test_zero_tokens_stay_zero(cpu_path, batch, remove):
    student, teacher = torch.randn(batch, 12, 8), torch.randn(batch, 12, 8)
    student[:, 4], teacher[:, 7] = 0, 0
    check(student.requires_grad_(), teacher, remove=remove)
    check(student, teacher, remove=remove, normalize=False)
    loss = fastssl.gram_loss(student, teacher, remove_negatives=remove, backend="cpp")
    assert (gradients(loss, [student], torch.ones(()))[0][:, 4] == 0).all()


@needs_library
def test_long_and_short_tokens(cpu_path):
    """Lengths from 1e-15, which is none, to 1e15, whose squares are still finite in float64 alone."""
    student = torch.randn(9, 31, 16) * torch.logspace(-15, 15, 31)[:, None]
    check(student.requires_grad_(), torch.randn(9, 31, 16) * torch.logspace(15, -15, 31)[:, None])


@needs_library
@pytest.mark.parametrize("batch", [2, 9], ids=["two-pass", "one-pass"])
@pytest.mark.parametrize("where", ["student", "teacher"])
@REMOVE
def test_nan_is_not_hidden(cpu_path, batch, where, remove):
    tensors = {"student": torch.randn(batch, 20, 8), "teacher": torch.randn(batch, 20, 8)}
    tensors[where][0, 3, 2] = float("nan")
    for normalize in (False, True):
        assert torch.isnan(fastssl.gram_loss(**tensors, normalize=normalize, remove_negatives=remove, backend="cpp"))


# ---- matrices that are nearly equal ----------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 50, 33), (9, 37, 64), (9, 197, 384)])
@pytest.mark.parametrize("remove", ["none", "both"])
@NORMALIZE
@pytest.mark.parametrize("per_image", [True, False])
def test_of_equal_tokens_nothing_is_left(cpu_path, dtype, shape, remove, normalize, per_image):
    student = make(*shape, dtype=dtype)
    options = dict(remove_negatives=remove, normalize=normalize, per_image=per_image, backend="cpp")
    loss = fastssl.gram_loss(student, student.detach().clone(), **options)
    assert loss == 0
    assert not gradients(loss, [student], torch.ones_like(loss))[0].any()


def plain(student, teacher, remove="none", normalize=True, per_image=True):
    """DINOv3's formula as its authors write it: img_level is per_image, remove_neg "both", its
    remove_only_teacher_neg "teacher"."""
    if normalize:
        teacher = torch.nn.functional.normalize(teacher, dim=-1)
    if not per_image:
        teacher = teacher.flatten(0, 1)
    target_sim = torch.matmul(teacher, teacher.transpose(-1, -2))
    if normalize:
        student = torch.nn.functional.normalize(student, dim=-1)
    if not per_image:
        student = student.flatten(0, 1)
    student_sim = torch.matmul(student, student.transpose(-1, -2))
    if remove == "both":
        target_sim[target_sim < 0] = 0.0
        student_sim[student_sim < 0] = 0.0
    elif remove == "teacher":
        target_sim[target_sim < 0] = 0.0
    return torch.nn.functional.mse_loss(student_sim, target_sim)


@needs_library
@pytest.mark.parametrize("per_image", [True, False])
@REMOVE
@NORMALIZE
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_the_formula_of_dinov3(per_image, remove, normalize, backend):
    student = make(9, 37, 24)
    teacher = torch.randn(9, 37, 32)
    exact, exact_teacher = doubles([student, teacher])
    truth = plain(exact, exact_teacher, remove, normalize, per_image)
    loss = fastssl.gram_loss(
        student, teacher, normalize=normalize, remove_negatives=remove, per_image=per_image, backend=backend
    )
    assert_close(loss, truth, FORWARD[torch.float32])
    got, expected = (torch.autograd.grad(x, leaf)[0] for x, leaf in ((loss, student), (truth, exact)))
    assert_close(got * 1e4, expected * 1e4, GRADIENT[torch.float32])


@needs_library
@pytest.mark.parametrize("away", [1.0, 1e-2, 1e-4])
@REMOVE
@NORMALIZE
@pytest.mark.parametrize("shape", [(2, 37, 64), (9, 37, 384), (1, 150, 384)])
def test_error_at_most_twice_that_of_plain_pytorch(cpu_path, away, remove, normalize, shape):
    """Also where the teacher is nearly the student, so that S − T cancels in both. The error of one loss is one random
    number, so that of many losses is compared."""
    errors = []
    for _ in range(16):
        student = make(*shape)
        teacher = student.detach() + away * torch.randn(shape)
        exact, exact_teacher = doubles([student, teacher])
        ours = fastssl.gram_loss(student, teacher, remove_negatives=remove, normalize=normalize, backend="cpp")
        theirs = plain(student, teacher, remove, normalize)
        truth = plain(exact, exact_teacher, remove, normalize)
        # Of a comparable size whatever the loss, or relative_error takes gradients for nothing.
        size = torch.tensor(student.numel() / truth.item() ** 0.5)
        (expected,) = gradients(truth, [exact], size.double())
        errors.append(
            [x.item() / truth.item() - 1 for x in (ours, theirs)]
            + [relative_error(gradients(x, [student], size)[0], expected) for x in (ours, theirs)]
        )
    mine, plains, of_gradient, of_plain_gradient = torch.tensor(errors).square().mean(0).sqrt().tolist()
    floor = torch.finfo(torch.float32).eps  # below one unit in the last place there is nothing to compare
    assert mine <= 2 * plains + floor
    assert of_gradient <= 2 * of_plain_gradient + floor


# ---- on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("length", [1, 37, 197, 700])
@pytest.mark.parametrize(("width", "other"), [(33, 33), (64, 384), (384, 384), (1024, 384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@REMOVE
@NORMALIZE
def test_triton_on_gpu(length, width, other, dtype, remove, normalize):
    student = make(2, length, width, dtype=dtype, device="cuda")
    teacher = teacher_like(student) if width == other else torch.randn(2, length, other, device="cuda").to(dtype)
    if not normalize:  # of length one on average, or float16's differences overflow
        student, teacher = (student.detach() / width**0.5).requires_grad_(), teacher / other**0.5
    tolerances = None if dtype == torch.float32 else (FORWARD[dtype], GRADIENT[dtype])
    check(student, teacher, backend="triton", remove=remove, normalize=normalize, tolerances=tolerances)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["map", "tokens"])
@pytest.mark.parametrize("per_image", [True, False])
def test_triton_on_gpu_layouts(dtype, layout, per_image):
    shape = (5, 24, 5, 7) if layout == "map" else (5, 35, 24)
    student = make(*shape, dtype=dtype, device="cuda")
    tolerances = None if dtype == torch.float32 else (FORWARD[dtype], GRADIENT[dtype])
    check(student, teacher_like(student), backend="triton", per_image=per_image, tolerances=tolerances)
