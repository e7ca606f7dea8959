"""What this installation is and whether its kernels give right answers."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

import recfast
from recfast import _C
from recfast.ops import _library


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    built = importlib.util.find_spec("recfast._cuda") is not None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report: dict[str, Any] = {"module": "built" if built else "not built", "device": device}
    if built:
        version = _library.cuda_module().runtime_version()
        report["runtime"] = f"{version // 1000}.{version % 1000 // 10}"
    return report


def config() -> dict[str, Any]:
    """What `show_config` prints, as a JSON-able dict."""
    return {
        "recfast": recfast.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {
            name: _version(name)
            for name in ("torch", "numpy", "polars", "lightning-fabric", "faiss-cpu", "safetensors", "triton")
        },
        "cpu": {
            "processor": _processor(),
            "isa": _C.isa(),
            "isa_detected": _C.detected_isa(),
            "vbmi": _C.has_vbmi(),
            "threads": torch.get_num_threads(),
            "openmp": "torch's own" if _library.shares_openmp() else f"apart from torch: {_C.openmp_library()}",
        },
        "cuda": _cuda(),
    }


def show_config() -> None:
    """Print version, packages, instruction set, threads, CUDA and Triton, as `numpy.show_config` does."""
    print(describe(config()))


def describe(values: dict[str, Any]) -> str:
    """`config()` as aligned lines."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {name:<17}{'none' if entry is None else entry}" for name, entry in value.items()]
        else:
            lines.append(f"{key:<19}{value}")
    return "\n".join(lines)


@dataclass(frozen=True)
class SelfTest:
    """The outcome for one op: `error` is None where every sample agreed with plain torch."""

    op: str
    samples: int
    milliseconds: float
    error: str | None


def self_test() -> list[SelfTest]:
    """Run every op of the registry on small samples and compare it with plain torch; takes about a second.

    Ops that are only the backward of another one have nothing to be compared with and are left out.
    """
    importlib.import_module("recfast.ops")
    results = []
    for name, op in sorted(_library.REGISTRY.items()):
        if op.expected is None:
            continue
        start, count, error = time.perf_counter(), 0, None
        try:
            for arguments in op.samples():
                torch.testing.assert_close(op.overload(*arguments), op.expected(*arguments), rtol=1e-4, atol=1e-5)
                count += 1
        except Exception as problem:  # a broken kernel must be reported, whatever it raises
            error = f"sample {count}: {' '.join(str(problem).split())}"
        results.append(SelfTest(name, count, (time.perf_counter() - start) * 1e3, error))
    return results
