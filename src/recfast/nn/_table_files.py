"""Tables on disk: one safetensors file, what it holds told in its header."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recfast.errors import InputError
from recfast.files import atomic_path, disk_errors

FORMAT = 2
_KEY = "recfast.tables"


def write(
    place: str, path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """Write tensors and JSON-able facts, whole or not at all."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    told = {"format": FORMAT, "kind": place, **facts, "crc32": _checksum(plain)}
    header = {_KEY: json.dumps({**told, "header_crc32": _header_checksum(told)}, allow_nan=False)}
    with disk_errors(place, Path(path)), atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=header)


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """The CRC-32 of all names and bytes: safetensors itself notices no flipped bit."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        if tensors[name].numel():
            crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def _header_checksum(facts: Mapping[str, Any]) -> int:
    known = {name: value for name, value in facts.items() if name != "header_crc32"}
    return zlib.crc32(json.dumps(known, sort_keys=True).encode())


def read(
    place: str, path: str | os.PathLike[str], *, mmap: bool, verify: bool
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write` wrote for the same `place`; with `mmap` the tensors stay in the file until they are used.

    `verify` compares the checksum of the tensors, which takes reading them all; that of the header is always compared.

    Raises
    ------
    InputError
        The file is missing, truncated, damaged, foreign, of another kind or of another format version.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{place}: {file} is missing")
    try:
        with safe_open(file, framework="pt") as handle:
            text = (handle.metadata() or {}).get(_KEY)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{place}: {file} is truncated or damaged, expected a whole safetensors file ({error})"
        ) from None
    if text is None:
        raise InputError(f"{place}: {file} holds no tables that recfast wrote")
    try:
        facts = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: {file} is damaged, its header is not JSON ({error})") from None
    if not isinstance(facts, dict):
        raise InputError(f"{place}: {file} is damaged, its header must hold an object, got {type(facts).__name__}")
    if facts.get("format") != FORMAT:
        raise InputError(f"{place}: {file} has the format version {facts.get('format')}, expected {FORMAT}")
    if facts.get("kind") != place:
        raise InputError(f"{place}: {file} holds {facts.get('kind')}, expected {place}")
    if facts.get("header_crc32") != _header_checksum(facts):
        raise InputError(f"{place}: {file} is damaged, its header does not fit its own checksum")
    if verify and facts.get("crc32") != (found := _checksum(tensors)):
        raise InputError(f"{place}: {file} is damaged, expected the checksum {facts.get('crc32')}, found {found}")
    # After an odd number of 16-bit weights, rows with steps begin where no float may: such a table is read.
    aligned = {name: x.dtype != torch.uint8 or x.data_ptr() % 4 == 0 for name, x in tensors.items()}
    return {name: x if mmap and aligned[name] else x.clone() for name, x in tensors.items()}, facts
