"""Files are whole or not there, tell a full disk in a sentence, and know when they are not what was written."""

from __future__ import annotations

import errno
import os

import numpy as np
import polars as pl
import pytest

from recfast import files
from recfast.errors import InputError


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with files.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("directory", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, error, directory):
    path = tmp_path / "a"
    with files.atomic_path(path, directory=directory) as temporary:
        (temporary / "x" if directory else temporary).write_text("old")

    def fail():
        with files.atomic_path(path, directory=directory) as temporary:
            (temporary / "x" if directory else temporary).write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert (path / "x" if directory else path).read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("one", "two"):
        with files.atomic_path(tmp_path / "a", directory=True) as temporary:
            (temporary / name).write_text(name)
    assert os.listdir(tmp_path / "a") == ["two"]
    assert os.listdir(tmp_path) == ["a"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("100000 requested and 8176 written"),
        OSError("No space left on device (os error 28)"),
        pl.exceptions.ComputeError("underlying IO error: No space left on device (os error 28)"),
    ],
    ids=["os", "numpy", "rust", "polars"],
)
def test_every_writers_words_for_a_full_disk(error):
    with pytest.raises(InputError) as found, files.disk_errors("save", "runs/x"):
        raise error
    assert str(found.value) == "save: runs/x cannot be written, the disk is full; what was there before is untouched"


def test_other_errors_pass():
    for error in (ValueError("x"), OSError(errno.ENOENT, "x"), InputError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as found, files.disk_errors("save", "runs/x"):
            raise error
        assert found.value is error


def test_the_outermost_place_speaks():
    def fail(inner, outer):
        with files.disk_errors("run", outer, "go on later"), files.disk_errors("checkpoint", inner):
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(InputError) as found:
        fail("runs/x/.pipeline.partial", "runs/x")
    assert str(found.value) == "run: runs/x cannot be written, the disk is full; go on later"
    with pytest.raises(InputError, match=r"^checkpoint: elsewhere/y cannot be written, the disk is full; what was"):
        fail("elsewhere/y", "runs/x")


def test_a_place_that_may_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"save: .*file.x cannot be written, not a directory; look elsewhere$"),
        files.disk_errors("save", tmp_path / "file" / "x", "look elsewhere"),
    ):
        (tmp_path / "file" / "x").write_text("x")


@pytest.fixture
def sealed(tmp_path):
    """A folder with checksums, and in it one that has its own."""
    root = tmp_path / "sealed"
    (root / "inner" / "deep").mkdir(parents=True)
    (root / "plain").mkdir()
    np.save(root / "a.npy", np.arange(5))
    (root / "plain" / "b.txt").write_text("b" * 100)
    (root / "empty").write_text("")
    (root / "inner" / "deep" / "c.txt").write_text("c")
    files.write_checksums(root / "inner")
    files.write_checksums(root)
    return root


def test_checksums_hold(sealed):
    files.verify_checksums(sealed, "load")
    files.verify_checksums(sealed / "inner", "load")
    (sealed / "more.txt").write_text("a file beside them is nobody's concern")
    files.verify_checksums(sealed, "load")


def test_an_inner_folder_vouches_for_itself(sealed):
    (sealed / "inner" / "deep" / "c.txt").write_text("d")
    files.verify_checksums(sealed, "load")
    with pytest.raises(InputError, match=r"load: .*c\.txt is damaged, expected the checksum \w{8}, found \w{8}"):
        files.verify_checksums(sealed / "inner", "load")
    files.write_checksums(sealed / "inner")
    with pytest.raises(InputError, match=r"load: .*inner.checksums\.json is (truncated or )?damaged"):
        files.verify_checksums(sealed, "load")


@pytest.mark.parametrize("name", ["a.npy", "plain/b.txt", "checksums.json", "inner/checksums.json"])
def test_every_change_shows(sealed, name):
    path = sealed / name
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match="truncated or damaged"):
            files.verify_checksums(sealed, "load")
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"is (truncated or )?damaged|is missing"):
            files.verify_checksums(sealed, "load")
    path.unlink()
    with pytest.raises(InputError, match=rf"{name} is missing"):
        files.verify_checksums(sealed, "load")
