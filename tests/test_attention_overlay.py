"""attention_overlay: where the colours land, what they are, and what comes back."""

import pytest
import torch

import fastssl
from fastssl import attention_overlay

COLORS = {"inferno": ("000004", "bb3755", "fcffa4"), "viridis": ("440154", "21908c", "fde725")}


def colour(word):
    return torch.tensor([int(word[i : i + 2], 16) / 255 for i in (0, 2, 4)])


def one_hot(height, width, row, column):
    attention = torch.zeros(height, width)
    attention[row, column] = 1
    return attention.flatten()


def brightest(shown):
    """Row and column of the pixel with the most light."""
    light = shown.float().sum(-3)
    return divmod(int(light.argmax()), light.shape[-1])


@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 5), (7, 2), (1, 6), (1, 1)])
@pytest.mark.parametrize("size", [(48, 48), (44, 68), (8, 120)])
def test_a_patch_lights_up_its_own_pixels(h, w, size):
    height, width = size
    image = torch.zeros(3, height, width)
    for row, column in {(0, 0), (h - 1, w - 1), (h // 2, w - 1), (h - 1, w // 3)}:
        attention = one_hot(h, w, row, column)
        shown = attention_overlay(image, attention, grid_size=(h, w), alpha=1, mode="nearest")
        down = ((torch.arange(height) + 0.5) * h / height).long() == row
        along = ((torch.arange(width) + 0.5) * w / width).long() == column
        inside = down[:, None] & along
        high, low = (colour(COLORS["inferno"][i]) for i in (-1, 0))
        if h * w == 1:
            high = low  # equal everywhere
        torch.testing.assert_close(shown[:, inside], high[:, None].expand(-1, int(inside.sum())))
        torch.testing.assert_close(shown[:, ~inside], low[:, None].expand(-1, int((~inside).sum())))
        smooth = attention_overlay(image, attention, grid_size=(h, w), alpha=1)
        if h * w > 1:
            i, j = brightest(smooth)
            assert inside[i, j]


@pytest.mark.parametrize("level", [0.0, 0.3, 1 / 16])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_uniform_attention_says_nothing(level, mode):
    image = torch.rand(3, 20, 30)
    shown = attention_overlay(image, torch.full((16,), level), alpha=0.25, mode=mode)
    expected = 0.75 * image + 0.25 * colour(COLORS["inferno"][0])[:, None, None]
    torch.testing.assert_close(shown, expected)


@pytest.mark.parametrize("colors", COLORS)
def test_colours_from_low_to_high(colors):
    attention = torch.tensor([-3.0, 1.0, 5.0])  # its scale does not matter
    shown = attention_overlay(torch.rand(3, 2, 3), attention, grid_size=(1, 3), alpha=1, colors=colors, mode="nearest")
    for i, word in enumerate(COLORS[colors]):
        torch.testing.assert_close(shown[:, 0, i], colour(word))


@pytest.mark.parametrize("colors", COLORS)
def test_colours_are_those_of_matplotlib(colors):
    colormaps = pytest.importorskip("matplotlib", reason="the demo extra is not installed").colormaps
    heat = torch.linspace(0, 1, 256)
    shown = attention_overlay(torch.zeros(3, 1, 256), heat, grid_size=(1, 256), alpha=1, colors=colors)
    theirs = torch.from_numpy(colormaps[colors](range(256))[:, :3]).T
    assert (shown[:, 0].double() - theirs).abs().max() <= 2 / 255


def test_alpha_blends():
    image, attention = torch.rand(2, 3, 16, 24), torch.rand(2, 16)
    torch.testing.assert_close(attention_overlay(image, attention, alpha=0), image)
    alone = attention_overlay(torch.zeros_like(image), attention, alpha=1)
    torch.testing.assert_close(attention_overlay(image, attention, alpha=0.3), 0.7 * image + 0.3 * alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("batch", [None, 1, 3, 0])
def test_what_comes_back_is_like_the_image(dtype, batch):
    shape = (3, 20, 30) if batch is None else (batch, 3, 20, 30)
    image = torch.rand(shape)
    image = (image * 255).round().to(dtype) if dtype == torch.uint8 else image.to(dtype)
    before = image.clone()
    attention = torch.rand(*shape[:-3], 2, 15)
    shown = attention_overlay(image, attention, grid_size=(3, 5))
    assert shown.shape == image.shape
    assert shown.dtype == dtype
    assert torch.equal(image, before)
    full = 255 if dtype == torch.uint8 else 1
    if shown.numel():
        assert shown.min() >= 0
        assert shown.max() <= full
        wide = attention_overlay(before.double() / full, attention, grid_size=(3, 5))
        unit = {torch.uint8: 0.5 / 255, torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6)
        assert (shown.double() / full - wide).abs().max() <= unit + 1e-5


def test_images_of_a_batch_are_drawn_as_alone():
    image, attention = torch.rand(3, 3, 20, 30), torch.rand(3, 2, 16)
    shown = attention_overlay(image, attention)
    for i in range(3):
        torch.testing.assert_close(shown[i], attention_overlay(image[i], attention[i]))


def test_each_map_has_its_own_scale():
    image, attention = torch.rand(2, 3, 20, 30), torch.rand(2, 16)
    scaled = attention * torch.tensor([[1.0], [1e-4]]) + torch.tensor([[0.5], [0.0]])
    torch.testing.assert_close(attention_overlay(image, scaled), attention_overlay(image, attention), atol=1e-5, rtol=0)


def test_heads_are_averaged_or_chosen():
    image, attention = torch.rand(3, 24, 24), torch.rand(4, 36).softmax(-1)
    assert torch.equal(attention_overlay(image, attention), attention_overlay(image, attention.mean(0)))
    for head in range(4):
        assert torch.equal(attention_overlay(image, attention, head=head), attention_overlay(image, attention[head]))
    one = attention[:1]
    assert torch.equal(attention_overlay(image, one, head=0), attention_overlay(image, one))


@pytest.mark.parametrize("batched", [False, True])
def test_maps_may_have_two_axes(batched):
    image = torch.rand(2, 3, 24, 24)
    attention = torch.rand(2, 4, 15)
    expected = attention_overlay(image, attention, grid_size=(3, 5))
    planes = attention.unflatten(-1, (3, 5))
    of_mean = planes.mean(1)
    if not batched:
        image, attention, planes, of_mean, expected = (t[0] for t in (image, attention, planes, of_mean, expected))
    assert torch.equal(attention_overlay(image, planes), expected)
    assert torch.equal(attention_overlay(image, planes, grid_size=(3, 5)), expected)
    torch.testing.assert_close(attention_overlay(image, of_mean, grid_size=(3, 5)), expected)


def test_takes_what_simpool_returns():
    pool = fastssl.nn.SimPool(8, num_heads=2, return_attention=True)
    with fastssl.use_backend("reference"):
        _, attention = pool(torch.randn(2, 8, 4, 6))
    shown = attention_overlay(torch.rand(2, 3, 64, 96), attention, grid_size=(4, 6))
    assert not shown.requires_grad
    assert shown.isfinite().all()


def test_any_strides_and_smaller_images():
    image = torch.rand(2, 20, 30, 3).permute(0, 3, 1, 2)
    attention = torch.rand(16, 2).t()
    expected = attention_overlay(image.contiguous(), attention.contiguous())
    assert torch.equal(attention_overlay(image, attention), expected)
    assert attention_overlay(torch.rand(3, 2, 1), torch.rand(196)).shape == (3, 2, 1)


IMAGE, ATTENTION = torch.rand(3, 20, 30), torch.rand(16)
BAD = [
    (dict(image="cat.png"), TypeError, "image must be a Tensor, got str"),
    (dict(image=(IMAGE * 255).int()), TypeError, "image must have a floating dtype or uint8, got dtype int32"),
    (dict(image=IMAGE[0]), ValueError, r"image must be \(3, H, W\) or \(B, 3, H, W\), got \(20, 30\)"),
    (dict(image=IMAGE.permute(1, 2, 0)), ValueError, r"image must be \(3, H, W\) .*, got \(20, 30, 3\)"),
    (dict(image=IMAGE[:, :0]), ValueError, r"image must be \(3, H, W\) .*, got \(3, 0, 30\)"),
    (dict(image=IMAGE * 255), ValueError, r"image must lie in \[0, 1\] where it is floating, got .* to 25"),
    (dict(image=IMAGE - 0.5), ValueError, r"image must lie in \[0, 1\] where it is floating, got -0\.[45]"),
    (dict(attention=[1.0]), TypeError, "attention must be a Tensor, got list"),
    (dict(attention=ATTENTION.long()), TypeError, "attention must have dtype .*, got dtype int64"),
    (dict(attention=ATTENTION.to("meta")), ValueError, "attention must be on the device of image .cpu., got meta"),
    (dict(attention=ATTENTION[:15]), ValueError, "attention must have N = h² tokens .*, got N = 15"),
    (dict(attention=ATTENTION[:0]), ValueError, r"attention must be \(N\), \(heads, N\) or \(heads, h, w\) for image"),
    (dict(attention=torch.rand(1, 2, 4, 4)), ValueError, r"attention must be \(N\), .*, got \(1, 2, 4, 4\)"),
    (dict(image=IMAGE[None]), ValueError, r"attention must be \(B, N\), \(B, heads, N\) .*, got \(16,\)"),
    (dict(image=IMAGE[None], attention=torch.rand(2, 16)), ValueError, r"attention must have image's batch \(B = 1\)"),
    (dict(grid_size=4), TypeError, r"grid_size must be None or two ints \(h, w\), got 4"),
    (dict(grid_size=(2, 7)), ValueError, r"grid_size must be \(h, w\) with h·w = N = 16 of attention, got \(2, 7\)"),
    (
        dict(attention=torch.rand(2, 4, 4), grid_size=(2, 8)),
        ValueError,
        r"grid_size must be None or \(h, w\) = \(4, 4\) of attention, got \(2, 8\)",
    ),
    (
        dict(attention=torch.rand(2, 4, 4), grid_size=3),
        TypeError,
        r"grid_size must be None or two ints \(h, w\), got 3",
    ),
    (dict(head=1), ValueError, "head must be from 0 to 0 for 1 heads, got 1"),
    (dict(head=-1), ValueError, "head must be from 0 to 0 for 1 heads, got -1"),
    (dict(head="mean"), TypeError, "head must be None or an int, got str"),
    (dict(alpha=1.5), ValueError, "alpha must be from 0 to 1, got 1.5"),
    (dict(alpha=None), TypeError, "alpha must be a finite number, got NoneType"),
    (dict(colors="jet"), ValueError, "colors must be one of 'inferno', 'viridis', got 'jet'"),
    (dict(mode="bicubic"), ValueError, "mode must be one of 'bilinear', 'nearest', got 'bicubic'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_sentence(change, error, message):
    given = {"image": IMAGE, "attention": ATTENTION} | change
    with pytest.raises(error, match=message) as caught:
        attention_overlay(given.pop("image"), given.pop("attention"), **given)
    assert str(caught.value).startswith("attention_overlay: ")
    assert "\n" not in str(caught.value)


def test_what_a_layer_returns_for_one_image():
    """(1, heads, N) could be one head's (h, w): drawn where the grid tells, refused where nothing does."""
    image, attention = torch.rand(3, 28, 28), torch.rand(1, 2, 49)
    expected = attention_overlay(image, attention[0])
    assert torch.equal(attention_overlay(image, attention, grid_size=(7, 7)), expected)
    assert torch.equal(attention_overlay(image[None], attention)[0], expected)
    with pytest.raises(ValueError, match=r"attention must be \(heads, N\) for image .* got \(1, 2, 49\)"):
        attention_overlay(image, attention)
    rows = torch.rand(1, 4, 7)  # no square number of patches: a map
    assert torch.equal(attention_overlay(image, rows), attention_overlay(image, rows[0], grid_size=(4, 7)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_attention_that_is_not_finite(bad):
    attention = torch.rand(4)
    attention[1] = bad
    with pytest.raises(ValueError, match="attention must be finite"):
        attention_overlay(torch.zeros(3, 8, 8, dtype=torch.uint8), attention)
