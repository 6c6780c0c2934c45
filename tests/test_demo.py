"""The demo: photographs, features that tell textures apart, pictures, true figures, a sentence a failure."""

from __future__ import annotations

import argparse
import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastssl
from fastssl.cli import demo

pytest.importorskip("matplotlib", reason="the demo extra is not installed")
pytest.importorskip("skimage", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")
pytest.importorskip("tqdm", reason="the demo extra is not installed")

from PIL import Image

from fastssl.cli import comparison, features, photos, pictures, small_vit

pytestmark = pytest.mark.filterwarnings("ignore:.*no fast backend:UserWarning")


def run_demo(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args([str(a) for a in arguments]))


def two_textures(height: int = 96, width: int = 144) -> np.ndarray:
    """Fine upright stripes on the left, checks of the same colours on the right."""
    y, x = np.mgrid[:height, :width]
    stripes, checks = x // 2 % 2, (x // 6 + y // 6) % 2
    dark = np.where(x < width // 2, stripes, checks)[..., None]
    return np.where(dark, [60, 70, 80], [200, 180, 160]).astype(np.uint8)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "SECONDS", 0.0)
    monkeypatch.setattr(comparison, "ROUNDS", 2)
    monkeypatch.setattr(features, "TOKENS", 300)
    monkeypatch.setattr(small_vit, "STEPS", 3)
    monkeypatch.setattr(small_vit, "BATCH", 4)
    monkeypatch.setattr(small_vit, "TOKENS", 60)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the demo opened a socket")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse, raising=False)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)


def test_photographs_come_from_the_installed_packages(no_network: None) -> None:
    found = photos.shipped_photos()
    assert len(found) >= 6
    assert len({photo.name for photo in found}) == len(found)
    for photo in found:
        height, width, colours = photo.pixels.shape
        assert colours == 3
        assert photo.pixels.dtype == np.uint8
        assert min(height, width) >= 250
        assert photo.pixels.std() > 20
        assert photo.credit


def test_a_photograph_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = photos.SHIPPED[0]
    gone = (entry._replace(path="data/nowhere.png"), entry._replace(package="no_such_package"))
    monkeypatch.setattr(photos, "SHIPPED", (*gone, entry))
    assert [photo.name for photo in photos.shipped_photos()] == [entry.name]


@pytest.mark.parametrize(("height", "width"), [(300, 450), (512, 512), (2000, 10), (1, 1), (3, 5000)])
def test_grid_keeps_proportions_and_size(height: int, width: int) -> None:
    rows, columns = features.grid(height, width)
    assert rows >= 1
    assert columns >= 1
    assert 0.8 * features.TOKENS <= rows * columns <= 1.2 * features.TOKENS
    if max(height, width) < 3 * min(height, width):
        assert columns / rows == pytest.approx(width / height, rel=0.1)


def test_a_patch_is_like_its_own_texture() -> None:
    patches = features.patch_features(two_textures())
    n = patches.rows * patches.columns
    assert patches.features.shape == (1, n, sum(size for _, size, _ in features.GROUPS))
    assert patches.features.isfinite().all()
    assert patches.features.mean(1).abs().max() < 1e-4
    relation = fastssl.self_relation(patches.features, **demo.PIXEL)[0, 0]
    left = torch.zeros(patches.rows, patches.columns, dtype=torch.bool)
    left[:, : patches.columns // 2] = True
    inner = torch.zeros_like(left)  # without the seam and the border
    inner[3:-3, 3 : patches.columns // 2 - 4] = True
    inner[3:-3, patches.columns // 2 + 4 : -3] = True
    left, inner = left.flatten(), inner.flatten()
    own = torch.where(left, relation[:, left].sum(1), relation[:, ~left].sum(1))
    assert own[inner].min() > 0.75


def test_a_colour_is_like_itself_where_texture_is_the_same() -> None:
    pixels = np.random.default_rng(0).integers(100, 120, (96, 144, 3)).astype(np.uint8)
    pixels[:, :72, 0] += 90
    patches = features.patch_features(pixels)
    relation = fastssl.self_relation(patches.features, **demo.PIXEL)[0, 0]
    plane = relation.view(-1, patches.rows, patches.columns)
    half = patches.columns // 2
    query = (patches.rows // 2) * patches.columns + 5
    assert plane[query][:, :half].sum() > 0.9


def test_features_do_not_know_the_place() -> None:
    patches = features.patch_features(np.tile(two_textures(112, 344), (2, 1, 1)))  # one above the other
    assert (patches.rows, patches.columns) == (28, 43)
    plane = patches.features[0].view(28, 43, -1)
    assert torch.allclose(plane[4:10], plane[18:24], atol=1e-5)
    assert not torch.allclose(plane[4:10], plane[4:10].flip(1), atol=1e-1)


def test_queries_are_the_same_every_time_and_differ() -> None:
    patches = features.patch_features(two_textures())
    chosen = features.choose_queries(patches, 6)
    assert chosen == features.choose_queries(patches, 6)
    assert len(set(chosen)) == 6
    assert all(0 <= q < patches.rows * patches.columns for q in chosen)
    assert {q % patches.columns < patches.columns // 2 for q in chosen} == {True, False}


def test_a_flat_picture_has_one_query_and_uniform_relations() -> None:
    shot = demo.study(photos.Photo("flat", "Flat", "", np.full((50, 80, 3), 90, np.uint8)), None)
    assert len(shot.queries) == 1
    assert shot.rows == pytest.approx(1 / (shot.patches.rows * shot.patches.columns))


def _exif(path: Path) -> None:
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, :40] = 255  # bright on the left; turned by a quarter, bright at the top
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(wide).save(path, exif=tags, quality=95)


def _check_exif(pixels: np.ndarray) -> None:
    assert pixels.shape == (80, 40, 3)
    assert pixels[:30].mean() > 240
    assert pixels[50:].mean() < 15


def _check_white(pixels: np.ndarray) -> None:
    assert (pixels == 255).all()


def _check_grey_ramp(pixels: np.ndarray) -> None:
    assert (pixels[..., 0] == pixels[..., 2]).all()
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert 100 < pixels.mean() < 155


_RAMP = np.arange(0, 60000, 60, dtype=np.uint16).reshape(20, 50)
ODD_PICTURES = {
    "one_pixel.png": (
        Image.new("RGB", (1, 1), (9, 8, 7)),
        lambda p: p.shape == (1, 1, 3) and p[0, 0, 0] == 9,
    ),
    "huge.jpg": (Image.new("RGB", (6000, 4000)), lambda p: max(p.shape) <= photos.LONGEST_SIDE * 2),
    "grey.png": (Image.fromarray((_RAMP // 235).astype(np.uint8)), lambda p: p.shape == (20, 50, 3)),
    "grey16.png": (Image.fromarray(_RAMP), _check_grey_ramp),
    "float.tif": (Image.fromarray(_RAMP.astype(np.float32) / 7), _check_grey_ramp),
    "clear.png": (Image.new("RGBA", (30, 20), (0, 0, 0, 0)), _check_white),
    "palette.png": (Image.new("P", (30, 20), 0), lambda p: p.shape == (20, 30, 3)),
    "bits.png": (Image.new("1", (30, 20), 1), _check_white),
    "print.jpg": (Image.new("CMYK", (30, 20), 0), _check_white),
}


@pytest.mark.parametrize("name", [*ODD_PICTURES, "exif.jpg"])
def test_any_picture_becomes_three_channels(name: str, tmp_path: Path) -> None:
    if name == "exif.jpg":
        _exif(tmp_path / name)
        check = _check_exif
    else:
        image, check = ODD_PICTURES[name]
        image.save(tmp_path / name)
    pixels = photos.read_pixels(tmp_path / name)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert max(pixels.shape) <= photos.LONGEST_SIDE
    assert check(pixels) is not False


def _picture(path: Path, grey: bool = False) -> Path:
    Image.fromarray(two_textures()).convert("L" if grey else "RGB").save(path)
    return path


BAD_FILES = {
    "missing.png": (lambda path: None, "does not exist"),
    "folder.png": (lambda path: path.mkdir(), "is a folder"),
    "text.png": (lambda path: path.write_text("no picture"), "is not a picture"),
    "cut.png": (lambda path: path.write_bytes(_picture(path).read_bytes()[:300]), "cannot be read"),
    "x" * 300 + ".png": (lambda path: None, "name"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gives_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = BAD_FILES[name]
    make(tmp_path / name)
    assert run_demo("--image", tmp_path / name, "--out", tmp_path / "out") == 2
    _one_sentence(capsys, words)
    assert not (tmp_path / "out").exists()


def _one_sentence(capsys: pytest.CaptureFixture[str], words: str) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fastssl demo: ")
    assert words in captured.err
    return captured.err


def test_an_unwritable_folder_gives_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = _picture(tmp_path / "a.png")
    assert run_demo("--image", picture, "--out", picture / "inside") == 2
    _one_sentence(capsys, "cannot write to")


@pytest.mark.parametrize("module", ["matplotlib", "skimage", "sklearn", "tqdm"])
def test_a_missing_extra_names_this_repository(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run_demo("--out", tmp_path / "out") == 2
    message = _one_sentence(capsys, "pip install --no-build-isolation '.[demo]'")
    assert "pip install fastssl" not in message


def test_a_backend_that_cannot_run_gives_its_reasons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = fastssl.Explanation("self_relation", "cpu", None, {"triton": ["there is no GPU"]})
    monkeypatch.setattr(fastssl, "explain", lambda *args, **kwargs: refused)
    picture = _picture(tmp_path / "a.png")
    assert run_demo("--image", picture, "--out", tmp_path / "out", "--backend", "triton") == 2
    _one_sentence(capsys, "there is no GPU")


@pytest.mark.parametrize("backend", ["automatic", "reference"])
def test_the_command_on_a_small_picture(
    backend: str, quick: None, no_network: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = _picture(tmp_path / "two.png", grey=True)
    before = picture.read_bytes()
    force = [] if backend == "automatic" else ["--backend", backend]
    code = run_demo("--image", picture, "--out", tmp_path, *force)  # beside the picture, which must survive
    said = capsys.readouterr()
    assert code == 0, said.err
    assert picture.read_bytes() == before
    made = {path.name for path in tmp_path.iterdir()} - {"two.png"}
    assert made == {"relation_two.png", "channels_two.png", "simpool_two.png", "table.md", "table.json"}
    for name in ("relation_two.png", "channels_two.png", "simpool_two.png"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            assert image.width == pictures.WIDTH
            assert 300 < image.height < 1000
            pixels = np.asarray(image.convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
        assert pixels.std() > 15
        assert name in said.out
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["equal"] is True
    assert content["provenance"]["threads"] == torch.get_num_threads()
    relations = ["pixel forward", "pixel forward+backward", "channel forward"]
    losses = ["pixel loss forward+backward", "channel loss forward+backward"]
    steps = ["forward", "forward+backward"]
    pools = [f"simpool{gamma} {step}" for gamma in ("", " gamma") for step in steps]
    assert [row["what"] for row in content["rows"]] == [*relations, *relations, *losses, *pools]
    assert len(content["rows"]) == comparison.ROWS
    for row in content["rows"]:
        limit, gradient_limit = comparison.OTHER_LIMITS.get(row["op"], (comparison.LIMIT, comparison.GRADIENT_LIMIT))
        assert 0 <= row["largest_difference"] <= limit
        assert 0 < row["value_error"] <= limit
        assert row["fused_ms"] > 0
        assert row["speedup"] == pytest.approx(row["eager_ms"] / row["fused_ms"])
        backward = row["what"].endswith("backward")
        assert (row["gradient_error"] is not None) == backward
        if backward:
            assert 0 < row["gradient_error"] <= gradient_limit
        if row["op"] == "simpool":
            assert row["shapes"] == [[8, 196, 384]]
            assert row["arguments"] == {"num_heads": 1, "gamma": 1.25 if "gamma" in row["what"] else None}
            continue
        batch, length, width = row["shapes"][0]
        heads = row["arguments"]["num_heads"]
        side = width // heads if row["arguments"]["kind"] == "channel" else length
        matrix, tokens = 4 * batch * heads * side * side, 4 * batch * length * width
        most = 10 * (matrix + tokens)
        assert matrix <= row["eager_peak_bytes"] < most
        if "loss" not in row["what"]:
            assert matrix <= row["fused_peak_bytes"] < most  # the float32 result
        elif row["backend"] != "reference":
            assert row["fused_peak_bytes"] < 2 * tokens  # the gradient, and no matrix
    assert content["rows"][3]["shapes"] == [[8, 196, 384]]
    last = said.out.strip().splitlines()[-1]
    used = {row["backend"] for row in content["rows"]}
    assert used == {fastssl.explain("self_relation", torch.zeros(1, 2, 8)).chosen if not force else backend}
    assert last.startswith("no fused kernel ran" if used == {"reference"} else "fused == reference")
    assert content["verdict"] == last
    assert last in (tmp_path / "table.md").read_text()


def test_a_wrong_kernel_is_named_and_fails_the_command(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: torch.Tensor, backend: str | None = None, **arguments: object) -> torch.Tensor:
        value = fastssl.reference.self_relation.self_relation(x, **arguments)
        return value + 1e-5 if arguments["kind"] == "channel" else value

    monkeypatch.setattr(fastssl, "self_relation", wrong)
    assert run_demo("--image", _picture(tmp_path / "a.png"), "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "fused == reference" not in said.out + said.err
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("fused != reference")
    assert "ViT-S tokens, channel forward" in last
    assert "pixel forward" not in last
    assert json.loads((tmp_path / "out" / "table.json").read_text())["equal"] is False


def test_a_map_is_bright_where_the_relation_is_high() -> None:
    grey = np.full((80, 120, 3), 128, np.uint8)
    relation = np.zeros((8, 12), np.float32)
    relation[2, 9] = 0.3
    shown = pictures.overlay(grey, relation).astype(int).sum(-1)
    assert shown.shape == (80, 120)
    assert np.unravel_index(shown.argmax(), shown.shape) == pytest.approx((24, 94), abs=6)
    assert shown[25, 95] > 2 * shown[60, 20]
    assert (pictures.overlay(grey, 0.01 * relation).sum(-1) == shown).all()  # scaled to its largest entry


def test_the_overview_is_for_a_first_screen(no_network: None, tmp_path: Path) -> None:
    found = {photo.name: photo for photo in photos.shipped_photos()}
    studies = [demo.study(found[name], None) for name in demo.BEST if name in found]
    assert len(studies) >= 2
    target = tmp_path / "self_relation.png"
    pictures.draw_overview(studies, target, "python -m fastssl demo", "call")
    assert target.stat().st_size < 1_000_000
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (pictures.HEADER + len(studies) * 185 - 10 + pictures.FOOTER, pictures.WIDTH, 3)
    width = (pictures.WIDTH - 2 * pictures.MARGIN - 4 * pictures.GAP) // 5
    for i in range(len(studies)):
        for j in range(5):
            x, y = pictures.MARGIN + j * (width + pictures.GAP), pictures.HEADER + i * 185
            tile = pixels[y : y + 175, x : x + width]
            assert tile.std() > 10, f"tile {j} of row {i} is blank"
        photo = np.asarray(Image.fromarray(studies[i].photo.pixels).resize((width, 175))).astype(int)
        shown = pixels[pictures.HEADER + i * 185 :][:175, pictures.MARGIN :][:, :width]
        assert np.median(np.abs(photo - shown)) < 12
