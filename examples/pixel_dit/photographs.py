"""Fetches the photographs of photographs.yaml: by package, version and hash, out of Debian packages and a wheel.

    python examples/pixel_dit/photographs.py photographs

A Debian package comes by `apt-get download` where there is one of that version, and else from snapshot.debian.org; a
wheel comes by pip. Nothing is installed. The folder then holds the photographs and `manifest.json`: of each its hash,
its size, the package, who made it, and its licence.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

SOURCES = Path(__file__).with_name("photographs.yaml")
SNAPSHOT = "https://snapshot.debian.org/archive/debian/20250520T000000Z/"
"""All of Debian as it was that day: these versions stay there when the mirrors have newer ones."""


class FetchError(RuntimeError):
    """A package that could not be had, or is another than expected."""


def fetch(folder: Path, sources: Path = SOURCES) -> list[dict[str, object]]:
    """Put the photographs into `folder`, with their manifest, which is returned.

    Raises FetchError naming the package and what went wrong. Photographs that are there already are not fetched again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = []
    for source in yaml.safe_load(sources.read_text(encoding="utf-8")):
        names = {one["file"]: f"{source['package']}-{one['file'].replace('/', '-')}" for one in source["pictures"]}
        if not all((folder / name).is_file() for name in names.values()):
            members = _members(source)
            for inside, name in names.items():
                path = f"{source['folder']}/{inside}"
                if path not in members:
                    raise FetchError(
                        f"{source['package']} {source['version']}: expected {path} in it, got no such file"
                    )
                _write(folder / name, members[path])
        for one in source["pictures"]:
            data = (folder / names[one["file"]]).read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
            manifest.append({
                "file": names[one["file"]], "sha256": hashlib.sha256(data).hexdigest(), "width": width,
                "height": height, "package": source["package"], "version": source["version"], "by": one["by"],
                "license": one["license"],
            })  # fmt: skip
    _write(folder / "manifest.json", (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    return manifest


def _members(source: Mapping[str, Any]) -> Mapping[str, bytes]:
    """The files of a package, by their paths in it, after its hash was compared."""
    get = {"debian": _debian, "wheel": _wheel}[source["kind"]]
    with tempfile.TemporaryDirectory() as scratch:
        archive = get(source, Path(scratch))
    found = hashlib.sha256(archive).hexdigest()
    if found != source["sha256"]:
        raise FetchError(f"{source['package']} {source['version']}: expected sha256 {source['sha256']}, got {found}")
    if source["kind"] == "wheel":
        with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if name.startswith(source["folder"])}
    with tarfile.open(fileobj=io.BytesIO(_data_of(archive))) as tar:
        files = {member.name.removeprefix("./"): member for member in tar if member.isfile() or member.issym()}
        return {
            name: reader.read()
            for name, member in files.items()
            if name.startswith(source["folder"]) and member.isfile() and (reader := tar.extractfile(member))
        }


def _debian(source: Mapping[str, Any], scratch: Path) -> bytes:
    if shutil.which("apt-get"):
        wanted = f"{source['package']}={source['version']}"
        done = subprocess.run(["apt-get", "-qq", "download", wanted], cwd=scratch, capture_output=True, text=True)
        packages = list(scratch.glob("*.deb"))
        if done.returncode == 0 and packages:
            return packages[0].read_bytes()
    url = SNAPSHOT + source["pool"]
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise FetchError(
            f"{source['package']} {source['version']}: expected it from apt-get or from {url}, got {error}"
        ) from None


def _wheel(source: Mapping[str, Any], scratch: Path) -> bytes:
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(scratch),
        "--platform", source["platform"], "--python-version", source["python"],
        f"{source['package']}=={source['version']}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise FetchError(f"{source['package']} {source['version']}: expected a wheel from pip, got {said}")
    return wheels[0].read_bytes()


def _data_of(package: bytes) -> bytes:
    """data.tar.* of a Debian package, which is an `ar` archive: a magic, then a header of 60 bytes before each part."""
    at = 8
    while at < len(package):
        name, size = package[at : at + 16].decode().strip(" /"), int(package[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2  # parts begin at even places
    raise FetchError("expected data.tar in a Debian package, got none")


def _write(path: Path, data: bytes) -> None:
    """All of a file or nothing of it, also if the process is killed."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch photographs that Debian packages and a wheel ship.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("photographs"))
    folder = parser.parse_args().folder
    try:
        found = fetch(folder)
    except FetchError as error:
        sys.exit(f"photographs.py: {error}")
    pixels = sum(int(str(one["width"])) * int(str(one["height"])) for one in found)
    print(f"{len(found)} photographs, {pixels / 1e6:.0f} megapixels, in {folder}")


if __name__ == "__main__":
    main()
