"""One wheel serves every torch: the compiled modules ask for no torch symbol and load without torch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from recfast import _C

# What a Linux with Python has: the C and C++ runtimes, libgomp, and CPython itself.
KNOWN_LIBRARIES = (
    "libc.so",
    "libm.so",
    "libstdc++.so",
    "libgcc_s.so",
    "libgomp.so",
    "libpthread.so",
    "libdl.so",
    "ld-linux",
)
FOREIGN_MARKS = ("torch", "c10", "caffe", "THP", "aten", "cuda")


def module_paths() -> list[Path]:
    specs = [importlib.util.find_spec(name) for name in ("recfast._C", "recfast._cuda")]
    return [Path(spec.origin) for spec in specs if spec is not None]


def dynamic(path: Path, *options: str) -> list[str]:
    listing = subprocess.run(["nm", "-D", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in listing.splitlines() if line.strip()]


@pytest.mark.parametrize("path", module_paths(), ids=lambda path: path.name)
def test_no_torch_symbol(path):
    undefined = dynamic(path, "--undefined-only")
    assert any(name.startswith("Py") for name in undefined), "the list of undefined symbols cannot be empty"
    foreign = [name for name in undefined if any(mark.lower() in name.lower() for mark in FOREIGN_MARKS)]
    assert not foreign, f"{path.name} needs symbols that a torch or CUDA library would have to give: {foreign}"


@pytest.mark.parametrize("path", module_paths(), ids=lambda path: path.name)
def test_needs_only_the_base_system(path):
    listing = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in listing.splitlines() if "(NEEDED)" in line]
    assert all(name.startswith(KNOWN_LIBRARIES) for name in needed), needed


@pytest.mark.parametrize("path", module_paths(), ids=lambda path: path.name)
def test_loads_without_torch(path):
    code = (
        "import importlib.util, sys\n"
        f"name, path = {path.name.split('.')[0]!r}, {str(path)!r}\n"
        "spec = importlib.util.spec_from_file_location(name, path)\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert callable(module.example_axpy_float32)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_isa_may_only_be_lowered():
    code = "from recfast import _C; print(_C.isa(), _C.detected_isa())"
    for asked in ("scalar", "avx512", "nonsense"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"RECFAST_ISA": asked, **_paths()},
        )
        active, detected = run.stdout.split()
        assert detected == _C.detected_isa()
        assert active == ("scalar" if asked == "scalar" else detected)
    with pytest.raises(ValueError, match="level must be one of scalar, avx2, avx512"):
        _C.set_isa("neon")


def test_threads_follow_torch():
    import torch

    from recfast.ops._library import kernel, shares_openmp

    kernel("example_axpy_float32")
    if shares_openmp():
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert _C.max_threads() == 1
        finally:
            torch.set_num_threads(before)


def test_an_own_openmp_is_told_the_number_of_threads(monkeypatch):
    """Where torch brings another runtime; arguments go through by place and by name."""
    import torch

    from recfast.ops import _library

    told = []
    monkeypatch.setattr(_library, "shares_openmp", lambda: False)
    monkeypatch.setattr(_library._C, "set_threads", told.append)
    sizes = {"heads": 1, "dim": 8, "value_dim": 8, "longest": 20}
    scratch = _library.kernel("sequence_attention_scratch")
    assert scratch(True, **sizes) == _C.sequence_attention_scratch(True, **sizes)
    assert told == [torch.get_num_threads()]


def _paths() -> dict[str, str]:
    import os

    return {key: os.environ[key] for key in ("PYTHONPATH", "PATH", "HOME") if key in os.environ}
