"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, which may not be copied into the project; skip where it is not."""
    path = Path(os.environ.get("RECFAST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("the real data sets are not here: set RECFAST_DATA to the folder that holds ml-100k, frappe, ...")
    return path
