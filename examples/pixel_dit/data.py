"""Pictures to learn from: any folder of them, or a zip file; split by picture, and cut into windows.

    python examples/pixel_dit/data.py show photographs --size 128
    python examples/pixel_dit/data.py pack photographs photographs.zip --max-mib 55

A picture belongs to training or to validation as a whole, by its hash: no window of one is near a window of the other.
Window number p of a training run follows from (seed, p) alone, so that any process can make it at any time.
"""

import argparse
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
VALIDATION_SHARE = 0.125
"""Of the area of all pictures, at least."""

Pixels = NDArray[np.uint8]


class DataError(ValueError):
    """A folder or picture that cannot be used."""


@dataclass(frozen=True)
class Picture:
    """pixels: [height, width, 3] after shrinking; sha256: of the file."""

    name: str
    sha256: str
    pixels: Pixels

    def windows(self, height: int, width: int) -> int:
        """How many windows of a size fit beside each other."""
        return (self.pixels.shape[0] // height) * (self.pixels.shape[1] // width)


class Windows:
    """Windows of one size, out of the pictures of a folder or a zip file.

    Args:
        path: the folder, searched through with its subfolders, or the zip file.
        size: (height, width) of a window.
        shrink: pictures are averaged over squares of so many pixels first, so that a window shows more of a picture.

    Pictures of the same bytes count once. One that is smaller than a window is left out, and named in `left_out`.

    Raises:
        DataError: where there are not at least two pictures to split, or one cannot be read.
    """

    def __init__(self, path: Path, size: tuple[int, int], shrink: int = 1) -> None:
        self.size = size
        pictures = read(path, shrink)
        fitting = [one for one in pictures if one.windows(*size)]
        self.left_out = [one.name for one in pictures if not one.windows(*size)]
        if len(fitting) < 2:
            raise DataError(
                f"data: expected at least two pictures of {size[0]}×{size[1]} pixels or more, after shrink={shrink}, "
                f"in {path}, got {len(fitting)} among {len(pictures)}"
            )
        self.train, self.validation = split(fitting)
        areas = np.array([one.pixels.shape[0] * one.pixels.shape[1] for one in self.train], dtype=np.float64)
        self._share = areas / areas.sum()

    def draw(self, seed: int, position: int) -> Pixels:
        """Training window number `position`: any place of any picture, each picture as often as it is large, half of
        them mirrored. [height, width, 3]"""
        random = np.random.default_rng([seed, 0, position])
        pixels = self.train[random.choice(len(self.train), p=self._share)].pixels
        height, width = self.size
        top, left = (int(random.integers(have - need + 1)) for have, need in zip(pixels.shape, self.size, strict=False))
        window = pixels[top : top + height, left : left + width]
        return window[:, ::-1] if random.random() < 0.5 else window

    def fixed(self, count: int) -> Pixels:
        """The first `count` validation windows, the same in every run: disjoint, [at most count, height, width, 3]."""
        height, width = self.size
        places = [
            (one, row * height, column * width)
            for one in self.validation
            for row in range(one.pixels.shape[0] // height)
            for column in range(one.pixels.shape[1] // width)
        ]
        chosen = np.random.default_rng(0).permutation(len(places))[:count]
        return np.stack([one.pixels[y : y + height, x : x + width] for one, y, x in (places[i] for i in chosen)])

    def manifest(self) -> dict[str, Any]:
        """What is learnt from and what is validated on: name, hash, windows beside each other."""
        named = {"train": self.train, "validation": self.validation}
        return {
            "size": list(self.size),
            "left_out": self.left_out,
            **{
                part: [{"file": x.name, "sha256": x.sha256, "windows": x.windows(*self.size)} for x in pictures]
                for part, pictures in named.items()
            },
        }


def split(pictures: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """(train, validation): in the order of their hashes, pictures go to validation until it has its share."""
    ordered = sorted(pictures, key=lambda one: one.sha256)
    areas = np.cumsum([one.pixels.shape[0] * one.pixels.shape[1] for one in ordered])
    count = int(np.searchsorted(areas, VALIDATION_SHARE * areas[-1])) + 1
    count = min(count, len(ordered) - 1)
    return ordered[count:], ordered[:count]


def files(path: Path) -> dict[str, bytes]:
    """The files of pictures in a folder or a zip file, by name. Raises DataError where there are none."""
    if path.is_dir():
        there = sorted(one for one in path.rglob("*") if one.is_file())
        found = {str(x.relative_to(path)): x.read_bytes() for x in there if x.suffix.lower() in SUFFIXES}
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in SUFFIXES)
            found = {name: archive.read(name) for name in names}
    else:
        raise DataError(
            f"data: expected a folder of pictures or a zip file, got {path}; "
            f"`python examples/pixel_dit/photographs.py {path}` fetches photographs"
        )
    if not found:
        raise DataError(f"data: expected pictures ({', '.join(sorted(SUFFIXES))}) in {path}, got none")
    return found


def read(path: Path, shrink: int = 1) -> list[Picture]:
    """All pictures of a folder or a zip file, upright, as RGB. Raises DataError naming a file that is no picture."""
    pictures: dict[str, Picture] = {}
    for name, data in files(path).items():
        digest = hashlib.sha256(data).hexdigest()
        if digest not in pictures:
            pictures[digest] = Picture(name, digest, np.asarray(_decode(name, data, shrink)))
    return list(pictures.values())


def _decode(name: str, data: bytes, shrink: int) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{name}: expected 8 bits a channel, got mode {image.mode}")
        image = image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: expected a picture, got {error}") from None
    return image.reduce(shrink) if shrink > 1 and min(image.size) >= shrink else image


def pack(path: Path, out: Path, max_mib: float, shrink: int = 1) -> int:
    """Write all pictures, and the folder's manifest, as one zip file; its bytes.

    Files go in as they are. With shrink they are averaged, and stored as JPEG of quality 95. Raises DataError where the
    file would be larger than `max_mib`.
    """
    made = files(path)
    if shrink > 1:
        for name, data in made.items():
            stream = io.BytesIO()
            _decode(name, data, shrink).save(stream, "JPEG", quality=95, subsampling=0)
            made[name] = stream.getvalue()
    total = sum(map(len, made.values()))
    if total > max_mib * 2**20:
        raise DataError(
            f"--max-mib: expected pictures of at most {max_mib:g} MiB, got {total / 2**20:.1f}; "
            f"try --shrink {shrink + 1}"
        )
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in made.items():
            archive.writestr(f"{name}.jpg" if shrink > 1 else name, data)
        if (path / "manifest.json").is_file():
            archive.write(path / "manifest.json", "manifest.json")
    return out.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description="Show how pictures are split, or pack them into one file.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the manifest of a split")
    show.add_argument("path", type=Path)
    show.add_argument("--size", type=int, nargs="+", default=[128], help="height and width of a window, or both in one")
    show.add_argument("--shrink", type=int, default=1)
    packing = commands.add_parser("pack", help="write the pictures as one zip file")
    packing.add_argument("path", type=Path)
    packing.add_argument("out", type=Path)
    packing.add_argument("--max-mib", type=float, default=55)
    packing.add_argument("--shrink", type=int, default=1)
    options = parser.parse_args()
    try:
        if options.command == "pack":
            size = pack(options.path, options.out, options.max_mib, options.shrink)
            print(f"{options.out}: {size / 2**20:.1f} MiB")
        else:
            windows = Windows(options.path, (options.size[0], options.size[-1]), options.shrink)
            print(json.dumps(windows.manifest(), indent=1, ensure_ascii=False))
    except DataError as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
