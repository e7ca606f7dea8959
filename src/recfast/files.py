"""Files that are either whole or not there, and that tell when they are no longer what was written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recfast.errors import InputError

CHECKSUMS = "checksums.json"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it there on success, remove it on failure.

    Parameters
    ----------
    path
        Where the finished file (or folder) shall be.
    directory
        Make the temporary path an empty folder; an existing folder at `path` is replaced.

    Raises
    ------
    OSError
        As the file system raises it (no space, no permission); nothing half-written stays behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        if directory:
            temporary.mkdir()
        yield temporary
        if directory:
            old = None
            if target.exists():
                # A folder cannot be renamed over a full one: step aside first, so that a crash leaves one of both.
                old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
                os.rename(target, old)
            os.rename(temporary, target)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        else:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, target)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def disk_error(error: BaseException, what: str, place: str | os.PathLike[str], advice: str = "") -> DiskError | None:
    """Return the sentence for a disk that takes no more or a place that may not be written, or None for all else.

    Parameters
    ----------
    error
        What a writer raised: an `OSError`, or what safetensors and polars make of one.
    what
        Who wrote, the first word of the sentence.
    place
        What could not be written.
    advice
        The end of the sentence, where there is more to say than that the earlier files are untouched.
    """
    code = getattr(error, "errno", None) or 0
    if not code:
        # Writers in Rust put the number in words; numpy only says how much of an array got through.
        text = str(error)
        if number := re.search(r"os error (\d+)", text):
            code = int(number[1])
        elif isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", text):
            code = errno.ENOSPC
    if code in _NO_SPACE:
        why = "the disk is full" if code == errno.ENOSPC else os.strerror(code).lower()
        why = f"{why}; {advice or 'what was there before is untouched'}"
    elif code in _NO_ACCESS:
        why = os.strerror(code).lower() + (f"; {advice}" if advice else "")
    else:
        return None
    # A file inside a folder that is not whole yet is told by the name it was to have.
    final = Path(re.sub(r"\.([^/]+)\.[0-9a-f]{8}\.partial", r"\1", os.fspath(place)))
    sentence = DiskError(f"{what}: {final} cannot be written, {why}")
    sentence.place = final
    return sentence


class DiskError(InputError):
    """A disk that takes no more, or a place that may not be written."""

    place: Path


@contextlib.contextmanager
def disk_errors(what: str, place: str | os.PathLike[str], advice: str = "") -> Iterator[None]:
    """Turn a full disk, or a folder that may not be written, into an `InputError` of one sentence (`disk_error`).

    Of several, one inside the other, the outermost whose place holds the others' is the one that speaks.
    """
    try:
        yield
    except DiskError as error:
        if Path(place) in error.place.parents and (sentence := disk_error(error.__cause__, what, place, advice)):
            raise sentence from error.__cause__
        raise
    except InputError:
        raise
    except Exception as error:
        if sentence := disk_error(error, what, place, advice):
            raise sentence from error
        raise


def write_checksums(folder: str | os.PathLike[str]) -> None:
    """Write size and CRC-32 of every file below `folder` to its `checksums.json`, the last file to be written.

    A folder inside that has a `checksums.json` of its own vouches for its files itself.
    """
    root = Path(folder)
    (root / CHECKSUMS).unlink(missing_ok=True)
    files: dict[str, list[int]] = {}
    for directory, inner, names in os.walk(root):
        here = Path(directory)
        if CHECKSUMS in names:
            names, inner[:] = [CHECKSUMS], []
        inner.sort()
        for name in sorted(names):
            path = here / name
            files[path.relative_to(root).as_posix()] = [path.stat().st_size, _crc32(path)]
    write_text(root / CHECKSUMS, _checksums_text(files))


def verify_checksums(folder: str | os.PathLike[str], what: str) -> None:
    """Compare the files below `folder` with what `write_checksums` noted.

    Raises
    ------
    InputError
        A file is missing, truncated or damaged; the sentence begins with `what` and names it.
    """
    root = Path(folder)
    path = root / CHECKSUMS
    try:
        text = path.read_bytes().decode()
        files = json.loads(text)["files"]
        entries = [(root / name, size, crc) for name, (size, crc) in files.items()]
        whole = text == _checksums_text(files)
    except FileNotFoundError:
        raise InputError(
            f"{what}: {path} is missing, expected the sizes and checksums of the files beside it"
        ) from None
    except OSError as error:
        raise InputError(f"{what}: {path} cannot be read, {(error.strerror or str(error)).lower()}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole, entries = False, []
    if not whole:
        raise InputError(f"{what}: {path} is truncated or damaged, expected the sizes and checksums of the files there")
    for file, size, crc in entries:
        try:
            found = file.stat().st_size
            if found != size:
                raise InputError(f"{what}: {file} is truncated or damaged, expected {size} bytes, found {found}")
            if (sum_ := _crc32(file)) != crc:
                raise InputError(f"{what}: {file} is damaged, expected the checksum {crc:08x}, found {sum_:08x}")
        except FileNotFoundError:
            raise InputError(f"{what}: {file} is missing, expected a file of {size} bytes") from None
        except OSError as error:
            raise InputError(f"{what}: {file} cannot be read, {(error.strerror or str(error)).lower()}") from None


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _checksums_text(files: dict[str, list[int]]) -> str:
    crc = zlib.crc32(json.dumps(files, sort_keys=True).encode())
    return json.dumps({"files": files, "crc32": crc}, indent=1, ensure_ascii=False) + "\n"
