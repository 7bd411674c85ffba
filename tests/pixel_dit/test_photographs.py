"""Fetching photographs: what a package holds is unpacked and listed; another package than expected is an error."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import photographs
import pytest
import yaml
from PIL import Image


def png(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def debian_package(files: dict[str, bytes]) -> bytes:
    """An `ar` archive of three parts, of which the second has an odd length."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": stream.getvalue()}
    made = b"!<arch>\n"
    for name, content in parts.items():
        made += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    return made


def wheel(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages of one picture each, which apt-get and pip would bring."""
    packages = {
        "debian": debian_package({"usr/share/a/one.png": png(1), "usr/share/b/other.png": png(2)}),
        "wheel": wheel({"skimage/data/two.png": png(3)}),
    }
    for kind, content in packages.items():
        monkeypatch.setattr(photographs, f"_{kind}", lambda source, scratch, content=content: content)
    described: list[dict[str, Any]] = [
        {"kind": "debian", "folder": "usr/share/a", "pictures": [{"file": "one.png", "by": "A", "license": "CC0-1.0"}]},
        {"kind": "wheel", "folder": "skimage/data", "pictures": [{"file": "two.png", "by": "B", "license": "GPL"}]},
    ]
    for one in described:
        one |= {
            "package": f"of-{one['kind']}",
            "version": "1",
            "sha256": hashlib.sha256(packages[one["kind"]]).hexdigest(),
        }
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(described))
    return tmp_path / "sources.yaml"


def test_photographs_come_out_of_packages_with_a_manifest(sources: Path, tmp_path: Path) -> None:
    manifest = photographs.fetch(tmp_path / "out", sources)
    assert {x.name for x in (tmp_path / "out").iterdir()} == {"of-debian-one.png", "of-wheel-two.png", "manifest.json"}
    assert (tmp_path / "out" / "of-debian-one.png").read_bytes() == png(1)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest[1] == {
        "file": "of-wheel-two.png", "sha256": hashlib.sha256(png(3)).hexdigest(), "width": 6, "height": 4,
        "package": "of-wheel", "version": "1", "by": "B", "license": "GPL",
    }  # fmt: skip


def test_what_is_there_is_not_fetched_again(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = photographs.fetch(tmp_path / "out", sources)
    for kind in ("debian", "wheel"):
        monkeypatch.setattr(photographs, f"_{kind}", lambda *_: pytest.fail("fetched again"))
    assert photographs.fetch(tmp_path / "out", sources) == manifest


def test_another_package_than_expected_is_an_error(sources: Path, tmp_path: Path) -> None:
    described = yaml.safe_load(sources.read_text())
    described[1]["sha256"] = "0" * 64
    sources.write_text(yaml.safe_dump(described))
    with pytest.raises(photographs.FetchError, match=r"of-wheel 1: expected sha256 0+, got [0-9a-f]{64}"):
        photographs.fetch(tmp_path / "out", sources)


def test_a_picture_that_is_not_in_its_package_is_named(sources: Path, tmp_path: Path) -> None:
    sources.write_text(sources.read_text().replace("one.png", "none.png"))
    with pytest.raises(photographs.FetchError, match=r"of-debian 1: expected usr/share/a/none.png in it"):
        photographs.fetch(tmp_path / "out", sources)


def test_a_source_out_of_reach_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 100, "", "E: no network\n")
    monkeypatch.setattr(photographs.subprocess, "run", lambda *_, **__: failed)

    def no_network(url: str, **_: object) -> None:
        raise photographs.urllib.error.URLError("no network")

    monkeypatch.setattr(photographs.urllib.request, "urlopen", no_network)
    with pytest.raises(photographs.FetchError, match=r"lomiri-wallpapers-16.04 20.04.0-2: expected it from apt-get or"):
        photographs.fetch(tmp_path / "out")


def test_every_source_is_described_completely() -> None:
    for source in yaml.safe_load(photographs.SOURCES.read_text(encoding="utf-8")):
        assert len(source["sha256"]) == 64 and source["version"] and source["kind"] in ("debian", "wheel")
        assert all(set(one) == {"file", "by", "license"} for one in source["pictures"])
