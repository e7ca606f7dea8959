"""One file an index: safetensors, with the kind, the version, the options and checksums in its metadata.

Every array begins at a multiple of 64 bytes, so that a kernel reads the mapped file as it would read its own memory;
what lies between arrays are tensors of zeros named `_gap<n>`, since the format allows no holes.

Checksums are CRC-32, one for each 16 MiB of each array and one for the header (with its own eight digits as zeros): no
byte of the file, header included, can change unseen, and they are fast enough to be verified whenever a file is mapped.
They guard against damage, not against somebody who wants to deceive; neither did the SHA-256 of version 1, which anyone
who rewrites a file can rewrite too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from recfast.errors import InputError
from recfast.files import atomic_path

VERSION = 2
_ALIGN = 64
_PIECE = 1 << 24
_GAP = "_gap"
_BLANK = b"0" * 8
_KEY = b'"header_crc32":"'
_DTYPES = {
    "BOOL": "?",
    "I8": "i1",
    "U8": "u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
    "F16": "<f2",
    "F32": "<f4",
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}
# safetensors refuses longer headers too; a random length field would ask for terabytes otherwise.
_LONGEST_HEADER = 100_000_000


def save(path: str | os.PathLike[str], kind: str, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write the file, whole or not at all."""
    parts: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        # Little endian whatever the machine; a copy only where it is something else, or not contiguous.
        parts[name] = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        if gap := -array.nbytes % _ALIGN:
            parts[f"{_GAP}{len(parts)}"] = np.zeros(gap, dtype=np.uint8)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": f"recfast.{kind}",
            "version": str(VERSION),
            "config": json.dumps(config, sort_keys=True),
            "crc32": json.dumps(dict(zip(parts, _digests(list(parts.values())), strict=True))),
            "header_crc32": _BLANK.decode(),
        }
    }
    place = 0
    for name, array in parts.items():
        end = place + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    start = len(text).to_bytes(8, "little") + text
    at = start.index(_KEY) + len(_KEY)
    start = start[:at] + b"%08x" % zlib.crc32(start) + start[at + len(_BLANK) :]
    with atomic_path(path) as temporary:
        _write(temporary, start, parts.values())


def _write(path: os.PathLike[str], start: bytes, arrays: Iterable[np.ndarray]) -> None:
    with open(path, "wb") as file:
        file.write(start)
        for array in arrays:
            file.write(_bytes(array))


def load(
    path: str | os.PathLike[str], kind: str, *, mmap: bool, verify: bool = True
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the options and the arrays; with `mmap` the arrays are views of the file, private when written to.

    `verify=False` leaves the arrays' checksums unread, so that a mapped file is read only where a search reads it.

    Raises
    ------
    InputError
        No such file, not a file of this kind or a version known here, truncated or corrupt.
    """
    place = f"{kind}.load"
    try:
        size = os.path.getsize(path)
        if size < 8:
            raise InputError(f"{place}: {path} is not a recfast index: it has {size} bytes")
        content = np.asarray(np.memmap(path, dtype=np.uint8, mode="c")) if mmap else _read(path, size)
    except OSError as error:
        raise InputError(f"{place}: {path} cannot be read: {error.strerror or error}") from error
    header_end, header, metadata = _header(place, path, content)
    found = metadata.get("format", "")
    if found != f"recfast.{kind}":
        raise InputError(f"{place}: {path} must hold a recfast.{kind}, found {found or 'no format name'}")
    version = metadata.get("version")
    if version not in ("1", "2"):
        raise InputError(f"{place}: {path} has format version {version}, this recfast reads versions 1 and 2")
    try:
        end = header_end + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != len(content):
            raise InputError(f"{place}: {path} must have {end} bytes, found {len(content)}: truncated or damaged")
        if version == "1":
            _verify_first(place, path, content, header_end, metadata)
        else:
            # Before anything in the header is believed.
            _verify_header(place, path, content[:header_end].tobytes(), metadata)
        config = json.loads(metadata["config"])
        arrays = {name: _array(content, header_end, entry) for name, entry in header.items()}
        if version == "2":
            wanted = json.loads(metadata["crc32"])
            if verify:
                for name, digests in zip(arrays, _digests(list(arrays.values())), strict=True):
                    if wanted[name] != digests:
                        raise InputError(f"{place}: {path} is corrupt: {name} does not match its checksum")
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{place}: {path} is corrupt: its header does not describe its content") from error
    return config, {name: array for name, array in arrays.items() if not name.startswith(_GAP)}


def _read(path: str | os.PathLike[str], size: int) -> np.ndarray:
    # torch's memory begins at a multiple of 64 bytes, numpy's need not.
    content = torch.empty(size, dtype=torch.uint8).numpy()
    with open(path, "rb") as file:
        return content[: file.readinto(memoryview(content))]


def _header(place: str, path: Any, content: np.ndarray) -> tuple[int, dict[str, Any], dict[str, str]]:
    length = int.from_bytes(content[:8].tobytes(), "little")
    foreign = f"{place}: {path} is not a recfast index, or its header is damaged"
    if length > min(_LONGEST_HEADER, len(content) - 8):
        raise InputError(foreign)
    try:
        header = json.loads(content[8 : 8 + length].tobytes())
        metadata = header.pop("__metadata__", {})
        metadata.get("format")
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise InputError(foreign) from error
    return 8 + length, header, metadata


def _array(content: np.ndarray, header_end: int, entry: dict[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("data_offsets do not fit the shape")
    return content[header_end + begin : header_end + end].view(dtype).reshape(shape)


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _digests(arrays: list[np.ndarray]) -> list[list[int]]:
    """The CRC-32 of each piece of each array, on as many threads as torch uses."""

    def pieces() -> Iterator[memoryview]:
        for array in arrays:
            content = _bytes(array)
            for start in range(0, len(content), _PIECE):
                yield content[start : start + _PIECE]

    threads = torch.get_num_threads()
    if threads > 1 and sum(array.nbytes for array in arrays) > _PIECE:
        with ThreadPoolExecutor(threads) as pool:  # zlib runs without the GIL
            found = pool.map(zlib.crc32, pieces())
    else:
        found = map(zlib.crc32, pieces())
    return [[next(found) for _ in range(0, array.nbytes, _PIECE)] for array in arrays]


def _verify_header(place: str, path: Any, start: bytes, metadata: dict[str, str]) -> None:
    at = start.find(_KEY) + len(_KEY)
    blank = start[:at] + _BLANK + start[at + len(_BLANK) :]
    # A damaged header may name its checksum twice or elsewhere: what is compared is what the parser read.
    if at < len(_KEY) or metadata.get("header_crc32") != f"{zlib.crc32(blank):08x}":
        raise InputError(f"{place}: {path} is corrupt: its header does not match its checksum")


def _verify_first(place: str, path: Any, content: np.ndarray, header_end: int, metadata: dict[str, str]) -> None:
    """Version 1: one SHA-256 over the whole file, with its own 64 digits as zeros."""
    key = b'"checksum":"'
    at = content[:header_end].tobytes().find(key) + len(key)
    digest = hashlib.sha256(memoryview(content[:at]))
    digest.update(b"0" * 64)
    digest.update(memoryview(content[at + 64 :]))
    if at < len(key) or metadata.get("checksum") != digest.hexdigest():
        raise InputError(f"{place}: {path} is corrupt: its content does not match its checksum")
