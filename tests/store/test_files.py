"""Files: whole or not at all, by whatever kind of name, and what is found out before without a trace."""

import os
import threading
from pathlib import Path

import pytest

from llsa_gen.store.files import must_take, write_whole


@pytest.mark.parametrize("content", ["text é", b"\x00\xff"])
def test_a_file_is_written_and_replaced(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    for _ in range(2):
        must_take(path)
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "target").write_text("before")
    link = tmp_path / "link"
    link.symlink_to("folder/target")
    must_take(link)
    write_whole(link, "after")
    assert link.is_symlink() and (tmp_path / "folder" / "target").read_text() == "after"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["target"]


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    must_take(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_whole(pipe, "said")
    reader.join(60)
    assert read == ["said"] and pipe.is_fifo()


@pytest.mark.parametrize("folders", [False, True])
def test_what_can_not_be_written_is_named_and_left_alone(folders: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    for path, error in ((tmp_path / "folder", IsADirectoryError), (tmp_path / "file" / "x", NotADirectoryError)):
        with pytest.raises(error) as caught:
            must_take(path, folders=folders)
        assert str(caught.value.filename).startswith(str(tmp_path))
        with pytest.raises(error) as caught:
            write_whole(path, "x")
        assert caught.value.filename == str(path)
    missing = tmp_path / "a" / "b" / "c"
    if folders:
        must_take(missing, folders=True)
    else:
        with pytest.raises(FileNotFoundError):
            must_take(missing)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "precious"
