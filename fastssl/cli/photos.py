"""Photographs as arrays: the ones that scikit-learn and scikit-image install, or the user's own file."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

#: Larger pictures are scaled down to this many pixels on the longer side, more than the demo draws.
LONGEST_SIDE = 1400


class PhotoError(Exception):
    """One sentence that says what is wrong with a picture file."""


class Photo(NamedTuple):
    """A photograph: `pixels` is (height, width, 3) in uint8."""

    name: str
    title: str
    credit: str
    pixels: np.ndarray[Any, np.dtype[np.uint8]]


class _Shipped(NamedTuple):
    name: str
    title: str
    credit: str
    package: str
    path: str


#: What lies inside the installed packages themselves: nothing here is fetched.
SHIPPED = (
    _Shipped("cat", "A cat", "Stéfan van der Walt, CC0", "skimage", "data/chelsea.png"),
    _Shipped("flower", "A flower", "vultilion, CC BY 2.0", "sklearn", "datasets/images/flower.jpg"),
    _Shipped("temple", "A temple", "danielbuechele, CC BY 2.0", "sklearn", "datasets/images/china.jpg"),
    _Shipped("coffee", "A coffee", "Rachel Michetti, CC0", "skimage", "data/coffee.png"),
    _Shipped("astronaut", "An astronaut", "NASA, public domain", "skimage", "data/astronaut.png"),
    _Shipped("rocket", "A rocket", "SpaceX, public domain", "skimage", "data/rocket.jpg"),
    _Shipped("motorcycle", "A motorcycle", "Middlebury Stereo 2014", "skimage", "data/motorcycle_left.png"),
    _Shipped("tissue", "Stained tissue", "scikit-image, no known copyright", "skimage", "data/ihc.png"),
)


def shipped_photos() -> list[Photo]:
    """The photographs that are truly on this disk; a release that leaves one out makes the list shorter."""
    photos = []
    for entry in SHIPPED:
        spec = find_spec(entry.package)
        if spec is None or spec.origin is None:
            continue
        path = Path(spec.origin).parent / entry.path
        if path.is_file():
            photos.append(Photo(entry.name, entry.title, entry.credit, read_pixels(path)))
    return photos


def own_photo(path: Path) -> Photo:
    title = path.name if len(path.name) <= 40 else path.name[:39] + "…"
    return Photo(path.stem[:80], title, "", read_pixels(path))


def read_pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Any picture Pillow reads, upright, on white where it is transparent, as (height, width, 3) uint8.

    Raises:
        PhotoError: the file is missing, a folder, unreadable, or no picture.
    """
    try:
        if path.is_dir():
            raise PhotoError(f"{path} is a folder, not a picture")
        if not path.exists():
            raise PhotoError(f"{path} does not exist")
        if not path.is_file():
            raise PhotoError(f"{path} is not an ordinary file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow thinks of size or metadata does not stop the demo
            with Image.open(path) as image:
                image.draft("RGB", (LONGEST_SIDE, LONGEST_SIDE))
                picture = _three_channels(ImageOps.exif_transpose(image))
                picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), reducing_gap=2.0)
                return np.asarray(picture).copy()
    except PhotoError:
        raise
    except UnidentifiedImageError:
        raise PhotoError(f"{path} is not a picture in a format that Pillow reads") from None
    except (
        Exception
    ) as error:  # broken files raise whatever the format's decoder met: OSError, SyntaxError, struct.error
        reason = getattr(error, "strerror", None) or error
        raise PhotoError(f"{path} cannot be read as a picture: {reason}") from None


def _three_channels(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16- and 32-bit greyscale: convert() would clip instead of scale
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
        low, high = values.min(), values.max()
        grey = (values - low) / max(high - low, 1e-12) * 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return image.convert("RGB")
