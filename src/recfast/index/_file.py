"""One file an index: safetensors, with the kind, the version, the options and a checksum in its metadata.

The checksum is the SHA-256 of the whole file with the checksum's own 64 digits taken as zeros, so that no byte of the
file, header included, can change unseen.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from recfast.errors import InputError
from recfast.files import atomic_path

VERSION = 1
_BLANK = b"0" * 64
_KEY = b'"checksum":"'
_DTYPES = {"BOOL": "?", "U8": "<u1", "U16": "<u2", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
# safetensors refuses longer headers too; a random length field would ask for terabytes otherwise.
_LONGEST_HEADER = 100_000_000


def save(path: str | os.PathLike[str], kind: str, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write the file, whole or not at all."""
    metadata = {
        "format": f"recfast.{kind}",
        "version": str(VERSION),
        "config": json.dumps(config, sort_keys=True),
        "checksum": _BLANK.decode(),
    }
    with atomic_path(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, metadata)
        content = np.memmap(temporary, dtype=np.uint8, mode="r")
        header_end = 8 + int.from_bytes(content[:8].tobytes(), "little")
        place = content[:header_end].tobytes().index(_KEY) + len(_KEY)
        # Written as a file, not through the map: a full disk must be an OSError, not a signal.
        with open(temporary, "r+b") as file:
            file.seek(place)
            file.write(_digest(content, place).encode())
        del content


def load(path: str | os.PathLike[str], kind: str, *, mmap: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the options and the arrays; with `mmap` the arrays are views of the file, private when written to.

    Raises
    ------
    InputError
        No such file, not a file of this kind or version, truncated or corrupt.
    """
    place = f"{kind}.load"
    try:
        size = os.path.getsize(path)
        if size < 8:
            raise InputError(f"{place}: {path} is not a recfast index: it has {size} bytes")
        content = np.memmap(path, dtype=np.uint8, mode="c") if mmap else np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise InputError(f"{place}: {path} cannot be read: {error.strerror or error}") from error
    header_end, header, metadata = _header(place, path, content)
    found = metadata.get("format", "")
    if found != f"recfast.{kind}":
        raise InputError(f"{place}: {path} must hold a recfast.{kind}, found {found or 'no format name'}")
    if metadata.get("version") != str(VERSION):
        raise InputError(
            f"{place}: {path} has format version {metadata.get('version')}, this recfast reads version {VERSION}"
        )
    try:
        end = header_end + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != len(content):
            raise InputError(f"{place}: {path} must have {end} bytes, found {len(content)}: truncated or damaged")
        position = content[:header_end].tobytes().find(_KEY) + len(_KEY)
        # A damaged header may name its checksum twice or elsewhere: what is compared is what was read above.
        digest = _digest(content, position)
        if position < len(_KEY) or metadata.get("checksum") != digest:
            raise InputError(f"{place}: {path} is corrupt: its content does not match its checksum")
        config = json.loads(metadata["config"])
        arrays = {name: _array(content, header_end, entry) for name, entry in header.items()}
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{place}: {path} is corrupt: its header does not describe its content") from error
    return config, arrays


def _header(place: str, path: Any, content: np.ndarray) -> tuple[int, dict[str, Any], dict[str, str]]:
    length = int.from_bytes(content[:8].tobytes(), "little")
    foreign = f"{place}: {path} is not a recfast index, or its header is damaged"
    if length > min(_LONGEST_HEADER, len(content) - 8):
        raise InputError(foreign)
    try:
        header = json.loads(content[8 : 8 + length].tobytes())
        metadata = header.pop("__metadata__", {})
        metadata.get("format")
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(foreign) from error
    return 8 + length, header, metadata


def _array(content: np.ndarray, header_end: int, entry: dict[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("data_offsets do not fit the shape")
    # np.ndarray drops the memmap subclass, whose every slice would cost microseconds.
    return np.asarray(content)[header_end + begin : header_end + end].view(dtype).reshape(shape)


def _digest(content: np.ndarray, place: int) -> str:
    """SHA-256 of the file with the 64 bytes at `place` as zeros."""
    digest = hashlib.sha256(memoryview(content[:place]))
    digest.update(_BLANK)
    digest.update(memoryview(content[place + 64 :]))
    return digest.hexdigest()
