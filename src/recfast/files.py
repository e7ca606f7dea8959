"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
