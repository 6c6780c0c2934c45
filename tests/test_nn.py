"""fastssl.nn: the head that SERE relates tokens behind, and the geometry of crops."""

import pytest
import torch
from compare import assert_close
from torch import nn

import fastssl
from fastssl.nn import SelfRelationHead, overlap_grids

# ---- SelfRelationHead ------------------------------------------------------------------------------------------


def plain(head, x):
    """The same modules by hand, in float64, on an (B, C, h, w) copy."""
    copy = SelfRelationHead(head.dim).double().train(head.training)
    copy.load_state_dict(head.state_dict())
    projected = copy.projection(x.double().contiguous())
    return projected, copy.predictor(projected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["tokens", "map", "channels_last", "sliced tokens"])
def test_head(batch, training, layout):
    head = SelfRelationHead(12)
    nn.init.uniform_(head.projection[0].bias)
    nn.init.uniform_(head.predictor[1].weight)
    head.train(training)
    feature_map = torch.randn(batch, 12, 5, 5)
    tokens = feature_map.flatten(2).transpose(1, 2).contiguous()
    x = {
        "tokens": tokens,
        "map": feature_map,
        "channels_last": feature_map.to(memory_format=torch.channels_last),
        "sliced tokens": torch.cat((tokens[:, :1], tokens), 1)[:, 1:],  # without its class token
    }[layout]
    expected = plain(head, feature_map)
    for got, wanted in zip(head(x), expected, strict=True):
        if x.dim() == 3:
            assert got.is_contiguous()
            wanted = wanted.flatten(2).transpose(1, 2)
        assert_close(got, wanted, 1e-6)
        assert got.shape == x.shape


def test_head_of_tokens_that_are_no_square():
    head, x = SelfRelationHead(6).eval(), torch.randn(2, 6, 3, 5)
    tokens = x.flatten(2).transpose(1, 2)
    for of_tokens, of_map in zip(head(tokens, grid_size=(3, 5)), head(x), strict=True):
        torch.testing.assert_close(of_tokens, of_map.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("training", [False, True])
def test_head_copies_no_tokens(training):
    head, x = SelfRelationHead(64).train(training), torch.randn(2, 49, 64, requires_grad=True)
    with torch.profiler.profile() as profile:
        projected, predicted = head(x)
    assert not {"aten::copy_", "aten::clone"} & {event.key for event in profile.key_averages()}
    (projected.sum() + predicted.square().sum()).backward()
    assert x.grad.isfinite().all()


def test_head_has_the_keys_of_published_checkpoints():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = [*(f"projection.0.{k}" for k in norm), "predictor.0.weight", *(f"predictor.1.{k}" for k in norm)]
    state = SelfRelationHead(8).state_dict()
    assert list(state) == keys
    assert state["predictor.0.weight"].shape == (8, 8, 1, 1)


def test_head_converts_to_sync_batchnorm():
    head, x = SelfRelationHead(8).eval(), torch.randn(2, 9, 8)
    before, keys = head(x), list(head.state_dict())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert isinstance(synced.projection[0], nn.SyncBatchNorm)
    assert isinstance(synced.predictor[1], nn.SyncBatchNorm)
    assert list(synced.state_dict()) == keys
    for a, b in zip(synced(x), before, strict=True):
        torch.testing.assert_close(a, b)


def test_head_compiles_whole():
    head, x = SelfRelationHead(8), torch.randn(2, 9, 8)
    expected = head.eval()(x)
    for a, b in zip(torch.compile(head, fullgraph=True, backend="aot_eager")(x), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("x", "size", "error", "message"),
    [
        (torch.randn(2, 9, 7), None, ValueError, r"SelfRelationHead: x must have C = 8 channels, got \(2, 9, 7\)"),
        (torch.randn(2, 10, 8), None, ValueError, "SelfRelationHead: x must have N = h² tokens .* got N = 10"),
        (torch.randn(2, 10, 8), (2, 4), ValueError, r"grid_size must be \(h, w\) with h·w = N = 10 of x"),
        (torch.randn(9, 8), None, ValueError, r"x must be \(B, N, C\) or \(B, C, h, w\), got \(9, 8\)"),
        ([1.0], None, TypeError, "x must be a Tensor, got list"),
    ],
)
def test_head_refuses(x, size, error, message):
    with pytest.raises(error, match=message):
        SelfRelationHead(8)(x, size)
    with pytest.raises(ValueError, match="SelfRelationHead: dim must be an int of at least 1, got 0"):
        SelfRelationHead(0)


# ---- overlap_grids ---------------------------------------------------------------------------------------------


def slow_grids(rect_a, rect_b, down, across, flip_a, flip_b):
    """One image, in Python numbers."""
    (top_a, left_a, height_a, width_a), (top_b, left_b, height_b, width_b) = rect_a, rect_b
    top, left = max(top_a, top_b), max(left_a, left_b)
    bottom, right = min(top_a + height_a, top_b + height_b), min(left_a + width_a, left_b + width_b)
    grids = torch.full((2, down, across, 2), -2.0, dtype=torch.float64)
    if bottom <= top or right <= left:
        return grids
    for grid, (t, l, h, w), flip in ((grids[0], rect_a, flip_a), (grids[1], rect_b, flip_b)):
        for i in range(down):
            for j in range(across):
                y = top + (bottom - top) * (i / (down - 1) if down > 1 else 0.5)
                x = left + (right - left) * (j / (across - 1) if across > 1 else 0.5)
                x = 2 * (x - l) / w - 1
                grid[i, j, 0], grid[i, j, 1] = (-x if flip else x), 2 * (y - t) / h - 1
    return grids


def crops(batch):
    """Rectangles as RandomResizedCrop draws them from images of 200 × 300, as ints."""
    height, width = torch.randint(20, 150, (batch,)), torch.randint(20, 200, (batch,))
    top = (torch.rand(batch) * (200 - height)).long()
    left = (torch.rand(batch) * (300 - width)).long()
    return torch.stack((top, left, height, width), 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("size", [13, 6, (5, 7), 1, (1, 2)])
@pytest.mark.parametrize("flipped", [False, True])
def test_overlap_grids_of_random_crops(dtype, size, flipped):
    a, b = crops(40).to(dtype), crops(40).to(dtype)
    flips = (torch.rand(40) < 0.5, torch.rand(40) < 0.5) if flipped else None
    got = overlap_grids(a, b, size, flips)
    down, across = size if isinstance(size, tuple) else (size, size)
    f = torch.stack(flips, 1).tolist() if flipped else [(False, False)] * 40
    expected = [
        slow_grids(p, q, down, across, *flip)
        for p, q, flip in zip(a.double().tolist(), b.double().tolist(), f, strict=True)
    ]
    assert 5 < sum((e == -2).all().item() for e in expected) < 35
    for grid, wanted in zip(got, torch.stack(expected, 1), strict=True):
        assert grid.shape == (40, down, across, 2)
        assert grid.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(grid.double(), wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((0, 0, 10, 10), (10, 0, 5, 10)),  # one below the other
        ((0, 0, 10, 10), (0, 10, 10, 5)),  # side by side
        ((0, 0, 10, 10), (10, 10, 5, 5)),  # corner to corner
        ((0, 0, 10, 10), (50, 60, 5, 5)),
        ((0, 0, 10, 10), (3, 3, 0, 4)),  # a crop of nothing
        ((0, 0, 10, 10), (3, 3, float("nan"), 4)),
    ],
)
def test_crops_that_share_no_area(a, b):
    a, b = torch.tensor([a, a]), torch.tensor([b, (2, 3, 4, 5)])
    for grid in (*overlap_grids(a, b, 4), *overlap_grids(b, a, 4)):
        assert (grid[0] == -2).all()
        assert (grid[1].abs() <= 1).all()
    sampled = fastssl.sample_tokens(torch.randn(2, 9, 4), overlap_grids(a, b, 4)[0].float())
    assert (sampled[0] == 0).all()


def test_borders_are_exact():
    """A crop and itself, and a crop inside another with which it shares an edge."""
    a, b = torch.tensor([[7, 3, 61, 97], [7, 3, 61, 97]]), torch.tensor([[7, 3, 61, 97], [7, 50, 31, 50]])
    flips = torch.tensor([False, True]), torch.tensor([False, False])
    for grid in overlap_grids(a, a, 13, flips):
        assert (grid[:, 0, :, 1] == -1).all()
        assert (grid[:, -1, :, 1] == 1).all()
        assert (grid[:, :, (0, -1), 0].abs() == 1).all()
    in_a, in_b = overlap_grids(a, b, 13)
    assert (in_b[1].flatten(0, 1).amin(0) == -1).all()
    assert (in_b[1].flatten(0, 1).amax(0) == 1).all()
    assert (in_a[1, 0, :, 1] == -1).all()
    assert (in_a[1, :, -1, 0] == 1).all()


def colours(y, x):
    """A smooth image, in the coordinates of 200 × 300 pixels: (..., 5)."""
    y, x = torch.broadcast_tensors(y, x)
    waves = [(y + 2 * x) / 90, (y - x) / 70, y / 55, x / 60, (3 * y - x) / 160]
    return torch.stack([torch.sin(w + i) for i, w in enumerate(waves)], -1)


def cut(rects, flips, resolution):
    """The crops as (B, C, resolution, resolution) images."""
    at = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution
    images = []
    for (top, left, height, width), flip in zip(rects.double().tolist(), flips.tolist(), strict=True):
        image = colours((top + height * at)[:, None], (left + width * at)[None, :]).permute(2, 0, 1)
        images.append(image.flip(2) if flip else image)
    return torch.stack(images)


@pytest.mark.parametrize("flipped", [False, True])
def test_two_crops_show_the_same_colours_at_their_grids(flipped):
    batch, resolution = 30, 96
    a, b = crops(batch), crops(batch)
    flips = tuple(torch.rand(batch) < (0.5 if flipped else 0) for _ in range(2))
    grids = overlap_grids(a, b, 13, flips)
    seen = [
        fastssl.sample_tokens(cut(r, f, resolution), g.double()) for r, f, g in zip((a, b), flips, grids, strict=True)
    ]
    # Half a pixel from a crop's border on, zeros from beyond it shine in.
    inside = torch.stack([(g.abs() <= 1 - 1 / resolution).all(-1).flatten(1) for g in grids]).all(0)
    assert inside.sum() > 500
    torch.testing.assert_close(seen[0][inside], seen[1][inside], rtol=0, atol=2e-3)
    # And it is the colour that the original has there.
    first = torch.maximum(a, b)[:, :2].double()
    last = torch.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]).double()
    y, x = (
        (first[:, i, None] + (last - first)[:, i, None] * torch.linspace(0, 1, 13, dtype=torch.float64)) for i in (0, 1)
    )
    original = colours(y[:, :, None], x[:, None, :]).flatten(1, 2)
    torch.testing.assert_close(seen[0][inside], original[inside], rtol=0, atol=2e-3)


def test_overlap_grids_compile_whole_with_dynamic_batch():
    compiled = torch.compile(lambda a, b, f, g: overlap_grids(a, b, 6, (f, g)), fullgraph=True, backend="aot_eager")
    for batch in (4, 7, 2):
        args = crops(batch), crops(batch), torch.rand(batch) < 0.5, torch.rand(batch) < 0.5
        for got, wanted in zip(compiled(*args), overlap_grids(*args[:2], 6, args[2:]), strict=True):
            torch.testing.assert_close(got, wanted)


def test_overlap_grids_read_no_value():
    """Meta tensors have none: what would wait for a device fails on them."""
    rect, flip = torch.empty(3, 4, device="meta"), torch.empty(3, dtype=torch.bool, device="meta")
    for grid in overlap_grids(rect, rect, 13, (flip, flip)):
        assert grid.shape == (3, 13, 13, 2)
    assert overlap_grids(torch.zeros(0, 4), torch.zeros(0, 4), 3)[0].shape == (0, 3, 3, 2)


RECT, FLIP = torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool)
BAD = [
    (dict(rect_a=[0, 0, 1, 1]), TypeError, "overlap_grids: rect_a must be a Tensor, got list"),
    (dict(rect_b=RECT[0]), ValueError, r"overlap_grids: rect_b must be \(B, 4\), got \(4,\)"),
    (dict(rect_a=RECT.bool()), TypeError, "rect_a must have a real number dtype, got dtype bool"),
    (dict(rect_b=RECT[:1]), ValueError, r"rect_b must have rect_a's batch \(B = 2\), got \(1, 4\)"),
    (dict(rect_b=RECT.to("meta")), ValueError, "rect_b must be on the device of rect_a .cpu., got meta"),
    (dict(size=0), ValueError, "size must be an int of at least 1, got 0"),
    (dict(size=2.5), TypeError, "size must be an int of at least 1, got float"),
    (dict(size=(3, 4, 5)), ValueError, r"size must be an int or two of them, got \(3, 4, 5\)"),
    (dict(flips=FLIP), TypeError, "flips must be None or two Tensors, got Tensor"),
    (dict(flips=(FLIP, None)), TypeError, "flips must be two Tensors of dtype bool, got NoneType"),
    (dict(flips=(FLIP, FLIP.int())), TypeError, "flips must be two Tensors of dtype bool, got dtype int32"),
    (dict(flips=(FLIP, FLIP[:1])), ValueError, r"flips must be two \(B,\) tensors with B = 2, got \(1,\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_overlap_grids_refuse(change, error, message):
    with pytest.raises(error, match=message):
        overlap_grids(**({"rect_a": RECT, "rect_b": RECT, "size": 3} | change))
