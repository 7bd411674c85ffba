"""`llsa-gen look`: it says what pixels keep, draws it, and has one clear error for what is wrong."""

import re
import sys
from pathlib import Path

import pytest
import torch
from commands import call
from matplotlib import image

from llsa_gen import load, reference
from llsa_gen.look import drawing, picture, pixels, views

HEIGHT, WIDTH = 12, 20


@pytest.fixture
def photo(place: Path) -> torch.Tensor:
    """A small picture in photo.png."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(HEIGHT, WIDTH, 3, generator=generator)
    colours[:, WIDTH // 2 :] *= 0.2
    image.imsave(place / "photo.png", colours.numpy())
    return picture.read(place / "photo.png")


# ---- what it says and draws -------------------------------------------------------------------------------------


def test_it_says_what_pixels_keep_and_where_the_picture_is(place: Path, photo: torch.Tensor) -> None:
    asked = [(0, 0), (19, 11), (7, 5)]
    result = call("look tiny --image photo.png -o seen.png " + " ".join(f"--query {x},{y}" for x, y in asked))
    assert (result.code, result.err) == (0, "")
    first, *lines, last = result.out.splitlines()
    assert first == "tiny over photo.png, 20×12 pixels = 240 tokens"
    assert last == "  picture  seen.png"

    spec = load("spec/tiny.yaml")
    layout = pixels.layout(spec, HEIGHT, WIDTH)
    tokens = pixels.tokens(spec, photo, layout, pixels.HEADS[-1:])
    kept = reference.select(spec, tokens.q, tokens.k)
    for (x, y), line in zip(asked, lines, strict=True):
        assert re.match(rf"  pixel {x},{y} +keeps ", line)
        token = int(layout.order.inverse[y * WIDTH + x])
        keys = reference.weight_rows(spec, kept, torch.tensor([token]), layout.n_tokens)[0, 0, 0]
        said = re.findall(r"([\d,]+) pixels at level (\d) \((\d+) of ([\d,]+) tokens\)", line)
        assert [level for _, level, _, _ in said] == ["2", "1"]
        for covered, level, count, of in said:
            span = spec.span(int(level))
            ids = kept[int(level) - 1][0, 0, token // span]
            assert int(count) == int((ids >= 0).sum()) and int(of) == 240 // span
            assert int(covered) == int(count) * span  # 240 is a multiple of both spans
        assert line.endswith(f"attends to {int((keys > 0).sum())} keys")


def test_the_drawing_is_a_card_of_the_picture(place: Path, photo: torch.Tensor) -> None:
    assert call("look tiny --image photo.png --query 3,4").code == 0
    drawn = image.imread(place / "look.png")
    assert drawn.shape[1:] == (drawing.WIDTH, 4)
    assert drawn[0, 0, 3] == 0 and drawn[30, 30, 3] == 1
    side = (drawing.WIDTH - 2 * drawing.MARGIN - drawing.GAP) / 2
    zoom = side / WIDTH
    assert drawn.shape[0] == round(drawing.HEAD + HEIGHT * zoom + drawing.FOOT)
    for row, column in ((1, 1), (10, 15)):  # of the last panel, which is the picture as it is
        down = int(drawing.HEAD + (row + 0.5) * zoom)
        right = int(drawing.MARGIN + side + drawing.GAP + (column + 0.5) * zoom)
        torch.testing.assert_close(torch.tensor(drawn[down, right, :3]), photo[:, row, column], atol=0.01, rtol=0)


def test_pixels_are_counted_in_the_file(place: Path, photo: torch.Tensor) -> None:
    result = call("look tiny --image photo.png --size 10 --query 19,11 --query '0, 11'")
    assert "photo.png, 20×12 pixels, averaged to 10×6 = 60 tokens" in result.out
    assert "pixel 19,11 " in result.out and "pixel 0,11 " in result.out
    spec = load("spec/tiny.yaml")
    layout = pixels.layout(spec, 6, 10)
    assert views.Query("", 11.5 / 12, 19.5 / 20).pixel(layout) == (5, 9)


def test_some_pixels_are_asked_about_by_default(place: Path, photo: torch.Tensor) -> None:
    found = re.findall(r"pixel (\d+),(\d+) ", call("look tiny --image photo.png").out)
    assert len(set(found)) == 3
    assert {(int(x) >= WIDTH // 2) for x, _ in found} == {(int(y) >= HEIGHT // 2) for _, y in found} == {True, False}


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (300, 2)])
def test_any_shape_will_do(shape: tuple[int, int], place: Path) -> None:
    image.imsave(place / "odd.png", torch.rand(*shape, 3).numpy())
    result = call("look tiny --image odd.png --size 60")
    assert (result.code, result.err) == (0, "")
    height = image.imread(place / "look.png").shape[0]
    assert height <= drawing.HEAD + drawing.TALLEST + drawing.FOOT


@pytest.mark.parametrize("head_dim", [8, 29, 30, 78, 150, 256])
def test_any_head_dim_will_do(head_dim: int, place: Path, photo: torch.Tensor) -> None:
    (place / "other.yaml").write_text(f"name: other\nhead_dim: {head_dim}\nlevels:\n  - {{block: 5, topk: 3}}\n")
    result = call("look other --image photo.png")
    assert (result.code, result.err) == (0, "")


# ---- reading pictures -------------------------------------------------------------------------------------------


def test_a_grey_picture_is_read_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    path.write_bytes(b"P5 3 2 255\n" + bytes([0, 51, 102, 153, 204, 255]))
    grey = torch.arange(6).reshape(2, 3) / 5
    torch.testing.assert_close(picture.read(path), grey.expand(3, 2, 3))


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    colours = torch.tensor([[[1.0, 0, 0, 1], [1, 0, 0, 0]]])
    image.imsave(tmp_path / "clear.png", colours.numpy())
    assert picture.read(tmp_path / "clear.png").equal(torch.tensor([[[1.0, 1]], [[0.0, 1]], [[0.0, 1]]]))


def test_a_picture_is_averaged_but_never_enlarged() -> None:
    whole = torch.rand(3, 8, 4)
    assert picture.averaged(whole, 8).equal(picture.averaged(whole, 100))
    torch.testing.assert_close(picture.averaged(whole, 100), whole)
    halved = picture.averaged(whole, 4)
    torch.testing.assert_close(halved, whole.unflatten(2, (2, 2)).unflatten(1, (4, 2)).mean((2, 4)))
    assert picture.averaged(torch.rand(3, 400, 1), 10).shape == (3, 10, 1)


# ---- what is wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image none.png", r"none\.png: No such file or directory"),
        ("--image .", r"\.: Is a directory"),
        ("--image spec/tiny.yaml", r"spec/tiny\.yaml: expected a picture, such as a PNG or a JPEG, got: other content"),
        ("--image short.png", r"short\.png: expected a picture, such as a PNG or a JPEG, got: .*truncated.*"),
        ("--image empty.png", r"empty\.png: expected a picture, such as a PNG or a JPEG, got: other content"),
        ("--image photo.png --query 20,3", r"--query 20,3: .* from 0,0 to 19,11, .* of 20×12 pixels"),
        ("--image photo.png --query 3,12", r"--query 3,12: .* from 0,0 to 19,11, .* of 20×12 pixels"),
        ("--image photo.png --query -1,3", r"--query -1,3: .* from 0,0 to 19,11, .* of 20×12 pixels"),
        *(
            (f"--image photo.png --query '{text}'", r"--query: expected X,Y, two integers such as 40,25, got .*")
            for text in ("5", "1,2,3", "a,b", "1.5,2", "", "1;2", "1" * 5000 + ",2", "١,٢")
        ),
        (
            "--image photo.png " + " ".join(f"--query {x},0" for x in range(9)),
            r"--query: expected at most 8 pixels, got 9",
        ),
        ("--image photo.png -o seen.jpg", r"-o seen\.jpg: expected a file that ends with \.png"),
        ("--image photo.png -o ./photo.png", r"-o photo\.png: expected another file than that of --image, .*"),
        ("--image photo.png -o none/seen.png", r".*none.*: No such file or directory"),
    ],
)
def test_what_is_wrong_is_one_clear_error(arguments: str, message: str, place: Path, photo: torch.Tensor) -> None:
    (place / "short.png").write_bytes((place / "photo.png").read_bytes()[:300])
    (place / "empty.png").touch()
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    result = call(f"look tiny {arguments}")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(message + "\n", result.err), result.err
    assert len(result.err) < 400
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_without_a_picture_it_asks_for_one(place: Path) -> None:
    result = call("look tiny")
    assert result.code == 2 and "--image" in result.err


def test_without_matplotlib_it_says_what_to_install(
    place: Path, photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("drawing", "picture"):
        monkeypatch.delitem(sys.modules, f"llsa_gen.look.{name}")
        monkeypatch.delattr(f"llsa_gen.look.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    result = call("look tiny --image photo.png")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(r"look needs matplotlib\S*: pip install 'llsa-gen\[demo\]'\n", result.err)
