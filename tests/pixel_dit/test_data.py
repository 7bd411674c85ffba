"""Pictures: split as a whole, cut at places that follow from the seed, and errors that name what is wrong."""

from pathlib import Path

import data
import numpy as np
import pytest
from PIL import Image
from tiny_runs import draw_pictures


def flat_pictures(folder: Path, count: int = 10) -> Path:
    """Every pixel of a picture says which picture it is."""
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (40, 30), (number, 2 * number, 100)).save(folder / f"{number}.png")
    return folder


def test_no_window_of_training_is_of_a_validation_picture(tmp_path: Path) -> None:
    windows = data.Windows(flat_pictures(tmp_path / "flat"), (8, 8))
    drawn = {int(windows.draw(0, position)[0, 0, 0]) for position in range(500)}
    fixed = {int(one[0, 0, 0]) for one in windows.fixed(10_000)}
    assert drawn and fixed and not drawn & fixed
    assert drawn | fixed == set(range(10))


def test_validation_has_its_share_and_training_the_rest(tmp_path: Path) -> None:
    windows = data.Windows(flat_pictures(tmp_path / "flat"), (8, 8))
    assert (len(windows.train), len(windows.validation)) == (8, 2)
    assert len(windows.fixed(10_000)) == 2 * 3 * 5


def test_validation_windows_are_disjoint(tmp_path: Path) -> None:
    folder = tmp_path / "places"
    folder.mkdir()
    for number in range(3):  # every pixel says where it is
        y, x = np.mgrid[:30, :40].astype(np.uint8)
        Image.fromarray(np.stack([y, x, np.full_like(x, number)], -1)).save(folder / f"{number}.png")
    fixed = data.Windows(folder, (8, 8)).fixed(10_000)
    pixels = {tuple(pixel) for one in fixed for pixel in one.reshape(-1, 3).tolist()}
    assert len(pixels) == len(fixed) * 64


def test_windows_follow_from_seed_and_position_alone(pictures: Path) -> None:
    one, other = data.Windows(pictures, (8, 12)), data.Windows(pictures, (8, 12))
    assert (one.draw(1, 5) == other.draw(1, 5)).all() and one.draw(1, 5).shape == (8, 12, 3)
    assert not (one.draw(1, 5) == one.draw(1, 6)).all() and not (one.draw(1, 5) == one.draw(2, 5)).all()


def test_a_copy_of_a_picture_counts_once(pictures: Path) -> None:
    (pictures / "again").mkdir()
    (pictures / "again" / "copy.png").write_bytes((pictures / "0.png").read_bytes())
    assert len(data.read(pictures)) == 6


def test_a_picture_smaller_than_a_window_is_named(pictures: Path) -> None:
    Image.new("RGB", (10, 10)).save(pictures / "tiny.png")
    assert data.Windows(pictures, (16, 16)).left_out == ["tiny.png"]


def test_shrinking_shows_more_of_a_picture(pictures: Path) -> None:
    assert data.read(pictures, 3)[0].pixels.shape == (20, 30, 3)


def test_a_pack_holds_the_same_pictures(pictures: Path, tmp_path: Path) -> None:
    data.pack(pictures, tmp_path / "pack.zip", 1)
    whole, packed = data.Windows(pictures, (16, 16)), data.Windows(tmp_path / "pack.zip", (16, 16))
    assert whole.manifest() == packed.manifest()
    assert (whole.draw(0, 3) == packed.draw(0, 3)).all()


def test_a_pack_that_would_be_too_large_is_an_error(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"--max-mib: expected pictures of at most 0.001 MiB"):
        data.pack(pictures, tmp_path / "pack.zip", 0.001)
    assert not (tmp_path / "pack.zip").exists()


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"expected a folder of pictures or a zip file, got .*nowhere"):
        data.Windows(tmp_path / "nowhere", (8, 8))
    with pytest.raises(data.DataError, match=r"expected pictures .* got none"):
        data.Windows(tmp_path, (8, 8))
    few = draw_pictures(tmp_path / "few", 3, 20, 20)
    with pytest.raises(data.DataError, match=r"at least two pictures of 32×32 .* got 0 among 3"):
        data.Windows(few, (32, 32))
    (few / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(data.DataError, match=r"broken.jpg: expected a picture"):
        data.Windows(few, (8, 8))
