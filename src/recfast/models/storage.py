"""Weights on disk: safetensors with a checksum, and every way of being wrong told in one sentence."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from recfast import models
from recfast.errors import InputError
from recfast.files import atomic_path, disk_errors, write_json

if TYPE_CHECKING:
    from recfast.data import Schema

FORMAT = 2
"""Version of the run folder; raised when an older reader would misread a newer folder."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write named tensors, and JSON-able metadata in the file's header, to `path` (which is not made atomic here)."""
    # The format holds no aliases: a tied weight is written twice and stays tied in the model that reads it. Tensors
    # that lie side by side in one storage, as embedding tables do, are no aliases.
    seen: dict[int, list[tuple[int, int]]] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        host = tensor.detach().to("cpu").contiguous()
        begin, end = host.data_ptr(), host.data_ptr() + host.numel() * host.element_size()
        places = seen.setdefault(host.untyped_storage().data_ptr(), [])
        plain[name] = host.clone() if any(a < end and begin < b for a, b in places) else host
        places.append((begin, end))
    header = {"format": FORMAT, "crc32": _checksum(plain), **metadata}
    path.touch()
    mode = path.stat().st_mode
    save_file(plain, path, metadata={k: json.dumps(v, allow_nan=False) for k, v in header.items()})
    # safetensors puts a file of its own there that none but its owner may read.
    path.chmod(mode)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: `(tensors, metadata)`.

    Raises
    ------
    InputError
        The file is missing, truncated, damaged, foreign, or of another format version.
    """
    if not path.is_file():
        raise InputError(f"checkpoint: {path} is missing")
    try:
        with safe_open(path, framework="pt") as handle:
            raw = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"checkpoint: {path} is truncated or damaged, expected a whole safetensors file, found "
            f"{path.stat().st_size} bytes that do not read as one ({error})"
        ) from None
    try:
        metadata = {name: json.loads(text) for name, text in raw.items()}
    except json.JSONDecodeError:
        metadata = {}
    check_format(path, metadata.get("format"))
    if metadata.get("crc32") != (found := _checksum(tensors)):
        raise InputError(f"checkpoint: {path} is damaged, expected the checksum {metadata.get('crc32')}, found {found}")
    return tensors, metadata


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the CRC-32 of all bytes, in the order of the names: safetensors itself notices no flipped bit."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        if tensors[name].numel():
            crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def check_format(path: Path, found: Any) -> None:
    """Refuse a file of another format version, or of no recfast at all."""
    if not isinstance(found, int):
        raise InputError(f"checkpoint: {path} was not written by recfast, expected a format version, found none")
    if found != FORMAT:
        raise InputError(f"checkpoint: {path} has the format version {found}, expected {FORMAT}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or damaged file is an `InputError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"checkpoint: {path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"checkpoint: {path} is damaged, expected a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"checkpoint: {path} is damaged, expected a JSON object, found {type(value).__name__}")
    return value


def split_state(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the model's state as tensors, and apart what its modules keep as JSON-able extra state."""
    state = model.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def restore_state(model: nn.Module, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any], path: Path) -> None:
    """Put saved state into the model; every name, shape and dtype is compared before the first is written.

    Raises
    ------
    InputError
        The file holds another model's weights, or tables of another vocabulary size.
    """
    expected, expected_extra = split_state(model)
    place = f"checkpoint: {path}"
    for name, module in model.named_modules():
        # Embedding tables know better than a shape what does not fit, and what to call.
        if hasattr(module, "check_state"):
            try:
                module.check_state(extra.get(f"{name}._extra_state" if name else "_extra_state"))
            except InputError as error:
                raise InputError(f"{place} does not fit: {error}") from None
    for name in sorted(expected.keys() - tensors.keys()) + sorted(expected_extra.keys() - extra.keys()):
        raise InputError(f"{place} is of another model: expected the tensor {name!r}, found none of that name")
    for name in sorted(tensors.keys() - expected.keys()) + sorted(extra.keys() - expected_extra.keys()):
        raise InputError(f"{place} is of another model: found the tensor {name!r}, which this model does not have")
    # Tables that grow take as many rows as were saved: all tensors of a module, or those that it names.
    growing: tuple[str, ...] = ()
    for name, part in model.named_modules():
        which = getattr(part, "resizable_state", False)
        growing += tuple(f"{name}." * bool(name) + own for own in (("",) if which is True else which or ()))
    for name, tensor in expected.items():
        wanted, found = list(tensor.shape), list(tensors[name].shape)
        if name.startswith(growing) and len(found) == len(wanted):
            wanted[:1] = found[:1]
        if wanted != found:
            raise InputError(
                f"{place} does not fit: {name!r} has the shape {found}, expected "
                f"{wanted} (another vocabulary, or other options of the model)"
            )
        if tensor.dtype != tensors[name].dtype:
            raise InputError(f"{place} does not fit: {name!r} is {tensors[name].dtype}, expected {tensor.dtype}")
    for name, module in model.named_modules():
        # Tensors whose values something relies on.
        if hasattr(module, "check_tensors"):
            begin = f"{name}." * bool(name)
            try:
                module.check_tensors({k[len(begin) :]: v for k, v in tensors.items() if k.startswith(begin)})
            except InputError as error:
                raise InputError(f"{place} is damaged: {begin}{error}") from None
    model.load_state_dict({**tensors, **extra})


def convert_model(model: nn.Module, precision: str, **options: Any) -> nn.Module:
    """See `recfast.models.convert`."""
    from recfast.nn import EmbeddingTables

    config = model.config()
    if "precision" not in config:
        raise InputError(f"models.convert: {type(model).__name__} has no option 'precision'")
    changed = {"precision": precision, "tables": {**config.get("tables", {}), **options}}
    new = models.build(type(model).__name__, model.schema, {**config, **changed})
    converted = [name for name, module in new.named_modules() if isinstance(module, EmbeddingTables)]
    dense = {
        name: value
        for name, value in model.state_dict().items()
        if not any(name.startswith(f"{tables}.") for tables in converted)
    }
    new.load_state_dict(dense, strict=False)
    for name in converted:
        mine, theirs = new.get_submodule(name), model.get_submodule(name)
        mine.take(theirs)
        mine.grad_scale, mine.check_finite = theirs.grad_scale, theirs.check_finite
        if "lr" not in options:
            mine.lr = theirs.lr  # which may have been set since the model was built
    return new.train(model.training)


def save_model(model: nn.Module, schema: Schema, folder: str | os.PathLike[str]) -> None:
    """Write the files that `load_model` reads, and nothing of the training, to a folder; each whole or not at all."""
    place = Path(folder)
    config = json.loads(json.dumps(model.config(), allow_nan=False))
    tensors, extra = split_state(model)
    with disk_errors("checkpoint", place):
        place.mkdir(parents=True, exist_ok=True)
        schema.save(place / "schema.json")
        with atomic_path(place / "model.safetensors") as temporary:
            write_tensors(temporary, tensors, {"extra": extra})
        write_json(place / "state.json", {"format": FORMAT, "model": {"name": type(model).__name__, "config": config}})


def load_model(run: str | os.PathLike[str]) -> nn.Module:
    """See `recfast.models.load`."""
    from recfast.data import Schema

    folder = Path(run)
    if not folder.is_dir():
        raise InputError(f"models.load: {folder} is not a folder, expected a run that recfast wrote")
    state = read_json(folder / "state.json")
    check_format(folder / "state.json", state.get("format"))
    described = state.get("model")
    if not isinstance(described, dict) or not {"name", "config"} <= described.keys():
        raise InputError(f"checkpoint: {folder / 'state.json'} is damaged, expected the model's name and config")
    if not (folder / "schema.json").is_file():
        raise InputError(f"checkpoint: {folder / 'schema.json'} is missing")
    model = models.build(described["name"], Schema.load(folder / "schema.json"), described["config"])
    path = folder / "model.safetensors"
    tensors, metadata = read_tensors(path)
    restore_state(model, tensors, metadata.get("extra", {}), path)
    return model.eval()
