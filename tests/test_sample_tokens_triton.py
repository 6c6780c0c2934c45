"""sample_tokens' Triton kernels under Triton's interpreter, against grid_sample in float64, in float32 and float16.

bfloat16 forward too: it has no product. The interpreter's tl.dot multiplies the raw bits of bfloat16, so that the
gradient of x in bfloat16 is left to the compilations of tests/test_triton_compile.py and to machines with a GPU.
"""

import pytest
import torch
from compare import assert_close, doubles, gradients, relative_error
from sampling import check, grid_sample, make, points
from tolerances import FORWARD, LARGE_MAPS

import fastssl
from fastssl import kernels

pytestmark = pytest.mark.skipif(
    kernels.why_not("cpu") is not None, reason=kernels.why_not("cpu") or "triton runs under its interpreter"
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


def run(x, grid, **kwargs):
    return check(x, grid, backend="triton", **kwargs)


@DTYPES
@pytest.mark.parametrize("size", [(1, 1), (14, 14), (1, 9), (20, 11)])
@pytest.mark.parametrize("channels", [1, 33, 130])
@pytest.mark.parametrize("layout", ["tokens", "map"])
def test_sizes_and_layouts(dtype, size, channels, layout):
    """One block of channels, of tokens and of points, several, and what is left over."""
    x = make((2, size[0] * size[1], channels) if layout == "tokens" else (2, channels, *size), dtype)
    for grid in (points(2, 3, 4), points(2, 6, 7)):
        run(x, grid, grid_size=size)


@DTYPES
def test_the_shape_of_sere(dtype):
    run(make((1, 196, 384), dtype), points(1, 13))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_of_the_grid(dtype, grid_dtype):
    x = make((2, 49, 35), dtype).requires_grad_(dtype != torch.bfloat16)
    run(x, points(2, 6, 5, dtype=grid_dtype))


def test_weights_are_not_rounded_to_16_bits():
    """What is left is the rounding of the result; weights of 16 bits would add as much again."""
    x, grid = make((1, 49, 64), torch.float16), points(1, 9)
    upstream = torch.randn(1, 81, 64).half()
    (got,) = gradients(fastssl.sample_tokens(x, grid, backend="triton"), [x], upstream)
    leaves = doubles([x, grid])
    (truth,) = gradients(grid_sample(*leaves), leaves[:1], upstream.double())
    assert relative_error(got, truth) <= 1.1 * relative_error(truth.half(), truth)


def test_points_of_a_large_map_are_located_in_float64():
    """In float32 they would be off by 4e-6 of a token, and the gradient of points near a centre by all of it."""
    x, grid = make((1, 10000, 8)), points(1, 5)
    out, leaves = fastssl.sample_tokens(x, grid, backend="triton"), doubles([x, grid])
    assert_close(out, grid_sample(*leaves), LARGE_MAPS)


def test_points_in_raster_order_over_a_part_of_the_map():
    """Most tiles of points touch no row of most tiles of tokens, and are skipped."""
    ticks = torch.linspace(-0.4, 0.9, 16)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)[None]
    run(make((1, 400, 20)), grid.requires_grad_())


def test_strides():
    layouts = [
        torch.randn(2, 40, 9, 9)[:, 3:38, 1:7, 2:9],
        torch.randn(2, 35, 7, 6).transpose(2, 3),
        torch.randn(1, 35, 6, 7).expand(2, -1, -1, -1),
        torch.randn(2, 35, 6, 7).to(memory_format=torch.channels_last),
        torch.randn(2, 84, 70)[:, ::2, ::2],
    ]
    for x in layouts:
        run(x.requires_grad_(), points(2, 5, 4), grid_size=(6, 7))


def test_strides_of_grid_and_upstream_gradient():
    x = make((2, 16, 35))
    grid = points(2, 5).detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    for upstream in (
        torch.tensor(0.7).expand(2, 25, 35),
        torch.randn(2, 35, 25).transpose(1, 2),
        torch.randn(2, 26, 40)[:, 1:, 5:],
        torch.randn(2, 25, 70)[..., ::2],
    ):
        run(x, grid, upstream=upstream)


def test_borders():
    ticks = torch.tensor([-1, 1, -0.875, 0.875, -1.25, 1.25, -1.2, 1.2, -2, 1e6, 1e30, 0.1])
    grid = torch.cartesian_prod(ticks, ticks).reshape(1, 12, 12, 2).requires_grad_()
    out = run(make((1, 16, 9)), grid)
    far = (grid.detach().abs() >= 1.25).any(-1).flatten()
    assert (out[0, far] == 0).all()
    assert (out[0, ~far] != 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_coordinate_that_is_not_finite_gives_nan(value):
    x, grid = make((1, 9, 20)), points(1, 4, reach=0.9).detach()
    grid[0, 0, 1, 0] = grid[0, 2, 3, 1] = value
    grid.requires_grad_()
    out, expected = fastssl.sample_tokens(x, grid, backend="triton"), grid_sample(x, grid)
    torch.testing.assert_close(out, expected, equal_nan=True)
    upstream = torch.randn_like(out)
    for got, wanted in zip(gradients(out, [x, grid], upstream), gradients(expected, [x, grid], upstream), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


def test_a_nan_token_stays_where_it_is():
    x = torch.randn(1, 25, 20)
    x[0, 12] = float("nan")
    grid = points(1, 9).detach()
    out = fastssl.sample_tokens(x, grid, backend="triton")
    torch.testing.assert_close(out, grid_sample(x, grid), equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 9, 4), (2, 9, 0)])
def test_empty_batch_and_no_channels(shape):
    assert run(make(shape), points(shape[0], 2)).numel() == 0


def test_no_points():
    x, grid = make((2, 9, 4)), points(2, 1)[:, :0].detach().requires_grad_()
    assert run(x, grid).shape == (2, 0, 4)
    out = fastssl.sample_tokens(x, grid, backend="triton")
    assert (gradients(out, [x], torch.ones_like(out))[0] == 0).all()


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_only_wanted_gradients_are_computed(wanted):
    x, grid, grad = torch.randn(1, 3, 3, 6), points(1, 4).detach().flatten(1, 2), torch.randn(1, 16, 6)
    run = torch.ops.fastssl.sample_tokens_backward_triton
    everything, parts = run(grad, x, grid, 3), run(grad, x, grid, wanted)
    for bit in (0, 1):
        assert torch.equal(parts[bit], everything[bit]) if wanted >> bit & 1 else parts[bit].shape == (0,)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (0, 3, 4, 6)])
def test_opcheck(shape):
    x, grid = torch.randn(shape), points(shape[0], 3).detach().flatten(1, 2)
    forward, backward = torch.ops.fastssl.sample_tokens_forward_triton, torch.ops.fastssl.sample_tokens_backward_triton
    torch.library.opcheck(forward, (x, grid))
    for wanted in (1, 2, 3):
        torch.library.opcheck(backward, (torch.randn_like(forward(x, grid)), x, grid, wanted))


def test_repeatable_and_leaves_its_inputs_alone():
    x, grid, upstream = make((2, 49, 33)), points(2, 6), torch.randn(2, 36, 33)
    before = [t.detach().clone() for t in (x, grid, upstream)]
    runs = []
    for _ in range(2):
        out = fastssl.sample_tokens(x, grid, backend="triton")
        runs.append((out, *gradients(out, [x, grid], upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(b, t) for b, t in zip(before, (x, grid, upstream), strict=True))


def test_sampling_tokens_first_is_sampling_their_relation():
    """R₁ (X Xᵀ) R₂ᵀ = (R₁X)(R₂X)ᵀ."""
    x, rows, columns = torch.randn(2, 36, 24), points(2, 5, reach=1.4).detach(), points(2, 4, 3, reach=1.4).detach()
    gram, rows64, columns64 = doubles([x @ x.transpose(1, 2), rows, columns])
    expected = grid_sample(grid_sample(gram, rows64).transpose(1, 2), columns64).transpose(1, 2)
    first, second = (fastssl.sample_tokens(x, grid, backend="triton") for grid in (rows, columns))
    assert_close(first @ second.transpose(1, 2), expected, FORWARD[torch.float32])


def test_every_choice_is_compiled_by_the_proofs():
    from fastssl.kernels import sample_tokens

    def key(choice):
        return (choice.kernel.__name__, *sorted(choice.constexprs.items()), choice.num_warps, choice.num_stages)

    for exact in (False, True):
        compiled = {key(c) for c in sample_tokens.configurations() if ("fp32 " in c.description) == exact}
        for channels in (1, 32, 33, 384, 5000):
            assert key(sample_tokens.points_choice(channels)) in compiled
            assert key(sample_tokens.grad_points_choice(channels)) in compiled
            assert key(sample_tokens.grad_tokens_choice(channels, exact)) in compiled
