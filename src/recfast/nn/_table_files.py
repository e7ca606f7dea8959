"""Tables on disk: one safetensors file, what it holds told in its header."""

from __future__ import annotations

import json
import os
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
    header = {_KEY: json.dumps({"format": FORMAT, "kind": place, **facts}, allow_nan=False)}
    with disk_errors(place, Path(path)), atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)


def read(place: str, path: str | os.PathLike[str], *, mmap: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write` wrote for the same `place`; with `mmap` the tensors stay in the file until they are used.

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
    facts = json.loads(text)
    if facts.get("format") != FORMAT:
        raise InputError(f"{place}: {file} has the format version {facts.get('format')}, expected {FORMAT}")
    if facts.get("kind") != place:
        raise InputError(f"{place}: {file} holds {facts.get('kind')}, expected {place}")
    return tensors if mmap else {name: tensor.clone() for name, tensor in tensors.items()}, facts
