"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A shared machine is slow at times; a deadline would only measure the neighbours.
settings.register_profile("recfast", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("recfast")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, which may not be copied into the project; skip where it is not."""
    path = Path(os.environ.get("RECFAST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("the real data sets are not here: set RECFAST_DATA to the folder that holds ml-100k, frappe, ...")
    return path


@pytest.fixture(scope="session")
def isa_levels():
    """Gives a generator over every instruction set of this machine, set while its turn lasts."""
    from recfast import _C

    def levels():
        best = _C.detected_isa()
        names = ["scalar", "avx2", "avx512"]
        try:
            for name in names[: names.index(best) + 1]:
                _C.set_isa(name)
                yield name
        finally:
            _C.set_isa(best)

    return levels


@pytest.fixture(scope="session")
def opcheck():
    """Run `torch.library.opcheck` over every sample of an op; there is no list of exceptions."""
    import torch

    def check(op):
        samples = list(op.samples())
        assert samples, f"{op.name} has no samples"
        for arguments in samples:
            torch.library.opcheck(op.overload, arguments)

    return check


@pytest.fixture(scope="session")
def poisoned_empty():
    """Fill what `torch.empty` gives with NaN (floats) , so that an unwritten output shows."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cuda():
    """The CUDA device; skip without one."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device("cuda")
