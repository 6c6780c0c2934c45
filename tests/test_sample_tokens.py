"""sample_tokens against grid_sample in float64, on every code path of the CPU; and what sampling tokens is for."""

import itertools

import pytest
import torch
from compare import assert_close, doubles, gradients, relative_error
from sampling import DTYPES, check, grid_sample, make, needs_library, points
from tolerances import FORWARD

import fastssl
from fastssl.reference.sample_tokens import feature_map

# ---- values and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (14, 14), (1, 9), (5, 7), (40, 30)])
@pytest.mark.parametrize("channels", [1, 33, 384, 600])
@pytest.mark.parametrize("layout", ["tokens", "map", "channels_last"])
def test_sizes_and_layouts(cpu_path, size, channels, layout):
    """40×30 tokens are many for 3·4 points: their channels are gathered, not packed."""
    x = torch.randn(2, channels, *size)
    x = {
        "tokens": lambda: x.flatten(2).transpose(1, 2).contiguous(),
        "map": lambda: x,
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
    }[layout]()
    x.requires_grad_()
    for grid in (points(2, 3, 4), points(2, 13)):
        check(x, grid, grid_size=size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid_dtype", DTYPES)
@pytest.mark.parametrize("layout", ["tokens", "map"])
def test_dtypes(cpu_path, dtype, grid_dtype, layout):
    x = make((2, 49, 35) if layout == "tokens" else (2, 35, 7, 7), dtype)
    check(x, points(2, 6, 5, dtype=grid_dtype))


STRIDED = {
    "map transposed": lambda: torch.randn(2, 35, 7, 6).transpose(2, 3),
    "map sliced": lambda: torch.randn(2, 40, 9, 9)[:, 3:38, 1:7, 2:9],
    "map strided": lambda: torch.randn(2, 70, 12, 14)[:, ::2, ::2, ::2],
    "map expanded": lambda: torch.randn(1, 35, 6, 7).expand(2, -1, -1, -1),
    "one channel": lambda: torch.randn(2, 5, 6, 7)[:, 2:3],
    "tokens transposed": lambda: torch.randn(2, 35, 42).transpose(1, 2),
    "tokens sliced": lambda: torch.randn(3, 43, 50)[1:, 1:, 7:42],  # without their class token
    "tokens batch second": lambda: torch.randn(42, 2, 35).transpose(0, 1),
    "tokens strided": lambda: torch.randn(2, 84, 70)[:, ::2, ::2],
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("rows", [1, 6])
def test_any_strides(cpu_path, layout, rows):
    check(STRIDED[layout]().requires_grad_(), points(2, rows, 4), grid_size=(6, 7))


@pytest.mark.parametrize("layout", ["xy apart", "sliced", "transposed", "expanded"])
def test_any_strides_of_the_grid(cpu_path, layout):
    grid = {
        "xy apart": lambda: points(2, 5).detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "sliced": lambda: points(2, 7).detach()[:, 1:6, ::2],
        "transposed": lambda: points(2, 5, 4).detach().transpose(1, 2),
        "expanded": lambda: points(1, 5).detach().expand(2, -1, -1, -1),
    }[layout]()
    check(make((2, 16, 20)), grid.requires_grad_())


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("shape", [(2, 16, 35), (2, 35, 4, 4)])
def test_any_strides_of_the_upstream_gradient(cpu_path, layout, shape):
    upstream = {
        "expanded": lambda: torch.tensor(0.7).expand(2, 25, 35),
        "transposed": lambda: torch.randn(2, 35, 25).transpose(1, 2),
        "sliced": lambda: torch.randn(2, 26, 40)[:, 1:, 5:],
        "strided": lambda: torch.randn(2, 25, 70)[..., ::2],
    }[layout]()
    check(make(shape), points(2, 5), upstream=upstream)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_borders(cpu_path, backend):
    """Every pair of: both borders, between border and first centre, ±half a token beyond, just inside that, far out."""
    size, half = 4, 1 / 4
    ticks = [-1, 1, -1 + half / 2, 1 - half / 2, -1 - half, 1 + half, -1 - 0.9 * half, 1 + 0.9 * half]
    ticks += [-2, 2, -5, 1e6, 1e30, -1e30, 0.1]
    grid = torch.tensor(list(itertools.product(ticks, ticks))).reshape(1, len(ticks), len(ticks), 2).requires_grad_()
    x = make((1, size * size, 9))
    out = check(x, grid, backend=backend)
    far = (grid.detach().abs() >= 1 + half).any(-1).flatten()
    assert (out[0, far] == 0).all()
    assert (out[0, ~far] != 0).all()


@pytest.mark.parametrize("value", [-2.0, 3e38])
def test_all_points_outside(cpu_path, value):
    x, grid = make((2, 9, 5)), torch.full((2, 3, 3, 2), value, requires_grad=True)
    out = fastssl.sample_tokens(x, grid, backend="cpp")
    assert (out == 0).all()
    assert all((g == 0).all() for g in gradients(out, [x, grid], torch.ones_like(out)))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["tokens", "map"])
def test_a_coordinate_that_is_not_finite_gives_nan(cpu_path, backend, value, layout):
    """As grid_sample does on the CPU. Its neighbours and x's gradient are untouched."""
    x = make((1, 9, 20) if layout == "tokens" else (1, 20, 3, 3))
    grid = points(1, 4, reach=0.9).detach()
    grid[0, 0, 1, 0] = grid[0, 2, 3, 1] = value
    grid.requires_grad_()
    out, expected = fastssl.sample_tokens(x, grid, backend=backend), grid_sample(x, grid)
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert torch.isnan(out).all(-1).flatten().nonzero().flatten().tolist() == [1, 11]
    upstream = torch.randn_like(out)
    for got, wanted in zip(gradients(out, [x, grid], upstream), gradients(expected, [x, grid], upstream), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


@needs_library
@pytest.mark.parametrize("layout", ["tokens", "map"])
def test_a_nan_token_stays_where_it_is(cpu_path, layout):
    x = torch.randn(1, 25, 20)
    x[0, 12] = float("nan")
    x = x if layout == "tokens" else feature_map(x).contiguous()
    grid = points(1, 13).detach()
    out = fastssl.sample_tokens(x, grid, backend="cpp")
    torch.testing.assert_close(out, grid_sample(x, grid), equal_nan=True)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_points_of_an_identity_grid_are_the_tokens(cpu_path, dtype):
    """16 is a power of two: all centres are exact."""
    x = torch.randn(2, 256, 24).to(dtype)
    ticks = (2 * torch.arange(16) + 1) / 16 - 1
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).expand(2, -1, -1, -1)
    assert torch.equal(fastssl.sample_tokens(x, grid, backend="cpp"), x)


@needs_library
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("shape", [(0, 9, 4), (2, 9, 0), (0, 4, 3, 3)])
def test_empty_batch_and_no_channels(backend, shape):
    out = check(make(shape), points(shape[0], 2), backend=backend)
    assert out.numel() == 0


@needs_library
def test_no_points(cpu_path):
    x, grid = make((2, 9, 4)), points(2, 1)[:, :0].detach().requires_grad_()
    assert check(x, grid).shape == (2, 0, 4)
    out = fastssl.sample_tokens(x, grid, backend="cpp")
    assert (gradients(out, [x], torch.ones_like(out))[0] == 0).all()


@needs_library
def test_many_points_on_one_token(cpu_path):
    """In one chain, 20,000 alike terms would round the same way each time: to 2e-4."""
    check(make((1, 1, 40)), torch.full((1, 200, 100, 2), 0.1), upstream=torch.full((1, 20000, 40), 0.7))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 14), (torch.float32, 100), (torch.bfloat16, 14), (torch.float16, 14)]
)
def test_error_at_most_twice_that_of_plain_pytorch(dtype, size):
    """16 bits on small maps alone: grid_sample of larger ones overflows 16-bit offsets on the CPU."""
    x, grid = make((2, size * size, 64), dtype), points(2, 13, dtype=dtype)
    leaves64 = doubles([x, grid])
    truth = grid_sample(*leaves64)
    ours, plain = fastssl.sample_tokens(x, grid), grid_sample(x, grid)
    assert relative_error(ours, truth) <= min(2 * relative_error(plain, truth), torch.finfo(dtype).eps)
    upstream = torch.randn_like(ours)
    expected = gradients(truth, leaves64, upstream.double())
    for mine, theirs, e in zip(*(gradients(o, [x, grid], upstream) for o in (ours, plain)), expected, strict=True):
        assert relative_error(mine, e) <= min(2 * relative_error(theirs, e), 4 * torch.finfo(dtype).eps)


# ---- what it is for --------------------------------------------------------------------------------------------


def two_views(channels=24):
    """Maps of two sizes and grids of two sizes, some of whose points are outside."""
    grids = [points(2, 5, reach=1.4).detach().double(), points(2, 4, 3, reach=1.4).detach().double()]
    return torch.randn(2, channels, 6, 6).double(), grids


def sampled_on_both_axes(gram, size, rows, columns):
    """SERE's way: the (B, N, N) relation is a feature map of N channels, sampled on each axis in turn."""
    gram = grid_sample(gram, rows, size)  # (B, k², N)
    return grid_sample(gram.transpose(1, 2), columns, size).transpose(1, 2)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("size", [(6, 6), (3, 12)])
def test_sampling_tokens_first_is_sampling_their_relation(cpu_path, backend, size):
    """R₁ (X Xᵀ) R₂ᵀ = (R₁X)(R₂X)ᵀ."""
    x, grids = two_views()
    x = x.reshape(2, 24, *size)
    tokens = x.flatten(2).transpose(1, 2)
    first, second = (fastssl.sample_tokens(x, grid, backend=backend) for grid in grids)
    assert first.shape != second.shape
    assert (first == 0).all(-1).any()
    expected = sampled_on_both_axes(tokens @ tokens.transpose(1, 2), size, *grids)
    assert_close(first @ second.transpose(1, 2), expected, FORWARD[torch.float64])


@needs_library
def test_sampling_tokens_first_is_sampling_the_logits_of_self_relation():
    """Per head, and zero tokens are uniform rows, as SERE has them."""
    x, grids = two_views()
    heads = x.unflatten(1, (3, 8)).flatten(3).transpose(2, 3)  # (B, H, N, d)
    logits = [sampled_on_both_axes(h @ h.transpose(1, 2), (6, 6), *grids) for h in heads.unbind(1)]
    expected = (torch.stack(logits, 1) * 8**-0.5 / 0.5).softmax(-1)
    first, second = (fastssl.sample_tokens(x, grid) for grid in grids)
    got = fastssl.self_relation(first, columns=second, num_heads=3, temp=0.5)
    assert_close(got, expected, FORWARD[torch.float64])
    outside = (first == 0).all(-1)
    torch.testing.assert_close(got[:, 0][outside], torch.full_like(got[:, 0][outside], 1 / 12))


# ---- on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (14, 14), (20, 11), (56, 56)])
@pytest.mark.parametrize("channels", [1, 33, 384])
@pytest.mark.parametrize("layout", ["tokens", "map", "channels_last", "sliced"])
def test_triton_on_gpu(dtype, size, channels, layout):
    x = torch.randn(2, channels + 2, *size, device="cuda").to(dtype)
    x = {
        "tokens": lambda: x[:, 2:].flatten(2).transpose(1, 2).contiguous(),
        "map": lambda: x[:, 2:].contiguous(),
        "channels_last": lambda: x[:, 2:].contiguous(memory_format=torch.channels_last),
        "sliced": lambda: x[:, 1:-1],
    }[layout]()
    grid = points(2, 13).detach().cuda().requires_grad_()
    check(x.requires_grad_(), grid, grid_size=size, backend="triton")
    upstream = torch.randn(2, 1, 1, device="cuda").to(dtype).expand(-1, 169, channels)
    check(x, grid, grid_size=size, backend="triton", upstream=upstream)
