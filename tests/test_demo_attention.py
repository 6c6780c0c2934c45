"""The demo's small ViT, its training, and the page that shows where its SimPool layer looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fastssl

pytest.importorskip("matplotlib", reason="the demo extra is not installed")
pytest.importorskip("skimage", reason="the demo extra is not installed")
pytest.importorskip("PIL", reason="the demo extra is not installed")

from PIL import Image

from fastssl.cli import attention_page, photos, pictures, small_vit

pytestmark = pytest.mark.filterwarnings("ignore:.*no fast backend:UserWarning")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 4, "BATCH": 6, "TOKENS": 60}.items():
        monkeypatch.setattr(small_vit, name, value)


def pictures_of(*shapes: tuple[int, int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, (*shape, 3)).astype(np.uint8) for shape in shapes]


def test_training_is_the_same_every_time_and_leaves_no_trace(quick: None) -> None:
    shots = pictures_of((60, 90), (80, 50))
    state = torch.get_rng_state()
    told: list[float] = []
    first, second = small_vit.train(shots, told.append), small_vit.train(shots)
    assert torch.equal(torch.get_rng_state(), state)
    assert told == [0.25, 0.5, 0.75, 1.0]
    assert 0 <= first.accuracy <= 1
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_parameter_is_trained(quick: None) -> None:
    with torch.random.fork_rng():
        model = small_vit.SmallViT(3)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        logits, attention = model(torch.randn(4, 3, 64, 64))
    assert logits.shape == (4, 3)
    assert attention.shape == (4, 1, 64)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert torch.equal(parameter, before[name])
    assert isinstance(model.pool, fastssl.nn.SimPool)


def test_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stripes, checks and noise, whatever their colours, in a few seconds."""
    monkeypatch.setattr(small_vit, "STEPS", 40)
    monkeypatch.setattr(small_vit, "BATCH", 16)
    y, x = np.mgrid[:192, :288]
    planes = (x // 6 % 2, (x // 12 + y // 12) % 2, np.random.default_rng(0).integers(0, 2, x.shape))
    shots = [np.repeat((60 + 130 * plane)[..., None], 3, 2).astype(np.uint8) for plane in planes]
    assert small_vit.train(shots).accuracy > 0.8


@pytest.mark.parametrize("shape", [(60, 90), (300, 200), (1, 1), (3, 500)])
def test_looking_at_any_picture(quick: None, shape: tuple[int, int]) -> None:
    model = small_vit.SmallViT(2).eval()
    attention = small_vit.look(model, pictures_of(shape)[0])
    rows, columns = attention.shape
    assert 0.7 * 60 <= rows * columns <= 1.4 * 60
    assert float(attention.sum()) == pytest.approx(1, abs=1e-5)


def test_crops_are_squares_of_their_photograph() -> None:
    """On a canvas whose colours are the place: each crop shows one stretch of both axes, of the photograph's scale."""
    generator = torch.Generator().manual_seed(0)
    down, along = torch.meshgrid(torch.linspace(0, 1, 192), torch.linspace(0, 1, 288), indexing="ij")
    canvas = torch.stack((down, along, torch.zeros_like(down)))
    for ratio in (1.5, 1.0, 0.5):
        shown = small_vit.crops(canvas.expand(50, -1, -1, -1), torch.full((50,), ratio), generator)
        assert shown.shape == (50, 3, small_vit.CROP, small_vit.CROP)
        tall, wide = ((shown[:, i].amax((1, 2)) - shown[:, i].amin((1, 2))) for i in (0, 1))
        torch.testing.assert_close(tall / wide, torch.full((50,), ratio), rtol=0.05, atol=0.0)
        assert tall.max() <= 1
        assert 0.2 < (tall / min(ratio, 1)).min() < 0.4


def test_augmentation_changes_colours_and_keeps_shapes() -> None:
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    changed = small_vit.augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    grey = (changed[:, 0] - changed[:, 1]).abs().mean((1, 2)) < 0.1
    assert 15 < int(grey.sum()) < 50
    # Light and contrast are positive: what was bright stays bright.
    pairs = torch.stack((images[~grey].mean(1).flatten(1), changed[~grey].mean(1).flatten(1)), 1)
    assert all(float(torch.corrcoef(pair)[0, 1]) > 0.8 for pair in pairs)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_page_shows_each_photograph_and_its_map(count: int, tmp_path: Path) -> None:
    shots = [
        photos.Photo(f"p{i}", f"Photograph {i}", "nobody" if i else "", pixels)
        for i, pixels in enumerate(pictures_of((100, 150), (120, 80), (90, 200))[:count])
    ]
    maps = [torch.rand(4, 6) for _ in shots]
    target = tmp_path / "page.png"
    attention_page.draw_attention(shots, maps, target, "python -m fastssl demo", "A subtitle")
    with Image.open(target) as image:
        assert image.width == pictures.WIDTH
        assert 300 < image.height < 1000
        assert np.asarray(image.convert("RGB")).std() > 15


def test_a_map_lights_up_its_own_patch() -> None:
    attention = torch.zeros(4, 6)
    attention[1, 5] = 0.7
    shown = attention_page.overlaid(np.full((80, 120, 3), 128, np.uint8), attention).astype(int).sum(-1)
    assert shown.shape == (80, 120)
    down, along = np.unravel_index(shown.argmax(), shown.shape)
    assert 20 <= down < 40
    assert along >= 100
