"""`python -m fastssl demo`: what is like this patch, where does SimPool look? Pictures, and a table that compares."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

import fastssl
from fastssl._backends import NAMES

if TYPE_CHECKING:
    from fastssl.cli.photos import Photo
    from fastssl.cli.pictures import Study

#: The arguments of the two calls that the pictures show.
PIXEL: dict[str, Any] = {"num_heads": 1, "scale": 1.0, "temp": 0.17, "normalize": True}
CHANNEL: dict[str, Any] = {"num_heads": 1, "scale": 1.0, "temp": 0.5, "normalize": True}
CALL = 'fastssl.self_relation(features, kind="{kind}", normalize=True, scale={scale}, temp={temp})'

QUERIES = 6
#: How often the bar moves while the small ViT is trained.
TICKS = 20
#: The photographs of the overview, as far as they are there.
BEST = ("cat", "flower", "temple", "coffee")

EXTRAS = "the demo needs {missing}: run `pip install --no-build-isolation '.[demo]'` in the fastssl repository"


class DemoError(Exception):
    """One sentence that ends the demo."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="your own picture instead of the shipped photographs"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="FOLDER", help="where to write (default: demo)"
    )
    parser.add_argument("--backend", choices=NAMES, help="force a backend instead of the automatic choice")


def run(args: argparse.Namespace) -> int:
    """Exit code 0: all rows agree; 1: a row differs from the reference; 2: it could not run, and says why."""
    try:
        _need_extras(args.image)
        return _run(args)
    except DemoError as error:
        print(f"fastssl demo: {error}", file=sys.stderr)
        return 2


def _need_extras(image: Path | None) -> None:
    packages = {
        "numpy": "numpy",
        "PIL": "pillow",
        "skimage": "scikit-image",
        "matplotlib": "matplotlib",
        "tqdm": "tqdm",
    }
    if image is None:
        packages["sklearn"] = "scikit-learn"
    missing = [name for module, name in packages.items() if find_spec(module) is None]
    if missing:
        raise DemoError(EXTRAS.format(missing=", ".join(missing)))


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastssl.cli import comparison, table

    photos = _photos(args.image)
    _writable(args.out)
    _accepted(args.backend)
    steps = 2 * len(photos) + 3 + TICKS + comparison.ROWS
    with tqdm(total=steps, bar_format="{desc:<34} {bar:30} {n_fmt}/{total_fmt}  {elapsed}") as bar:
        studies = []
        for photo in photos:
            bar.set_description_str(f"relating the patches of {photo.name:.10}")
            studies.append(study(photo, args.backend))
            bar.update()
        command = "python -m fastssl demo"
        if args.image is not None:
            command += f" --image {photos[0].title}"
        written = _draw(studies, args.out, command, args.image is not None, bar)
        written.append(_attend(photos, args, command, bar))
        rows = []
        for case in comparison.cases([s.patches.features for s in studies], PIXEL, CHANNEL):
            bar.set_description_str(f"measuring {case.what}")
            rows.append(comparison.measure(case, args.backend))
            bar.update()
        bar.set_description_str("done")
    facts = comparison.provenance()
    with _writing(args.out):
        table.write(rows, facts, args.out)
    print(f"\nWritten to {args.out.resolve()}:")
    print("\n".join(f"  {name}" for name in [*written, "table.md", "table.json"]))
    print(f"\n{table.on_screen(rows, facts)}\n")
    equal, sentence = table.verdict(rows)
    print(sentence, file=sys.stdout if equal else sys.stderr)
    return 0 if equal else 1


def _draw(studies: list[Study], out: Path, command: str, own: bool, bar: Any) -> list[str]:
    """The names of the pictures drawn. Their prefixes keep a picture of the user's in `out` safe."""
    from fastssl.cli import pictures

    pixel, channel = CALL.format(kind="pixel", **PIXEL), CALL.format(kind="channel", **CHANNEL)
    best = [s for name in BEST for s in studies if s.photo.name == name] or studies
    overview = [] if own else ["self_relation.png"]
    channels = f"channels_{studies[0].photo.name}.png" if own else "channels.png"
    names = [f"relation_{s.photo.name}.png" for s in studies]
    with _writing(out):
        for one, name in zip(studies, names, strict=True):
            bar.set_description_str(f"drawing {one.photo.name:.26}")
            pictures.draw_photograph(one, out / name, command, pixel)
            bar.update()
        bar.set_description_str("drawing the overview")
        for name in overview:
            pictures.draw_overview(best[:4], out / name, command, pixel)
        bar.update()
        bar.set_description_str("drawing the channels")
        pictures.draw_channels(best[:3], out / channels, command, channel)
        bar.update()
    return [*overview, *names, channels]


def _attend(photos: list[Photo], args: argparse.Namespace, command: str, bar: Any) -> str:
    """Trains a small ViT on the photographs, a picture of the user's among the shipped ones; draws where it looks."""
    from fastssl.cli import attention_page, small_vit
    from fastssl.cli.photos import shipped_photos

    own = args.image is not None
    known = [*photos, *shipped_photos()] if own else photos
    bar.set_description_str(f"training a ViT on {len(known)} photographs")
    done = 0

    def tick(share: float) -> None:
        nonlocal done
        bar.update(int(share * TICKS) - done)
        done = int(share * TICKS)

    with nullcontext() if args.backend is None else fastssl.use_backend(args.backend):
        start = perf_counter()
        model, accuracy = small_vit.train([p.pixels for p in known], tick)
        seconds = perf_counter() - start
        bar.set_description_str("looking where SimPool looks")
        maps = [small_vit.look(model, p.pixels) for p in photos]
    name = f"simpool_{photos[0].name}.png" if own else "simpool.png"
    subtitle = (
        f"A ViT trained for {seconds:.0f} seconds, without labels, to tell from which of {len(known)} photographs a "
        f"recoloured crop is ({100 * accuracy:.0f} % right); its SimPool attention."
    )
    with _writing(args.out):
        attention_page.draw_attention(photos, maps, args.out / name, command, subtitle)
    bar.update()
    return name


def study(photo: Photo, backend: str | None) -> Study:
    """Features, queries and the two relations of one photograph."""
    from fastssl.cli import features, pictures

    patches = features.patch_features(photo.pixels)
    queries = features.choose_queries(patches, QUERIES)
    pixel = fastssl.self_relation(patches.features, kind="pixel", backend=backend, **PIXEL)[0, 0]
    channel = fastssl.self_relation(patches.features, kind="channel", backend=backend, **CHANNEL)[0, 0]
    rows = pixel[queries].view(len(queries), patches.rows, patches.columns)
    return pictures.Study(photo, patches, queries, rows.numpy(), channel.numpy())


def _photos(image: Path | None) -> list[Photo]:
    from fastssl.cli import photos

    try:
        found = photos.shipped_photos() if image is None else [photos.own_photo(image)]
    except photos.PhotoError as error:
        raise DemoError(str(error)) from None
    if not found:
        raise DemoError("this scikit-image and this scikit-learn ship no photographs; give one with --image FILE")
    return found


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DemoError(f"cannot write to {folder}: {error.strerror or error}") from None


def _writable(folder: Path) -> None:
    """Finds out before the work, not after it."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _accepted(backend: str | None) -> None:
    """Refuses a forced backend before anything is drawn, with all its reasons."""
    if backend is None:
        return
    x, square, row = (torch.zeros(shape, requires_grad=True) for shape in ((1, 2, 8), (8, 8), (8,)))
    for op, tensors in (("self_relation", (x,)), ("simpool", (x, square, square, row, row))):
        explanation = fastssl.explain(op, *tensors, backend=backend)
        if explanation.chosen is None:
            raise DemoError(f"backend {backend!r} cannot run here: {'; '.join(explanation.reasons[backend])}")
