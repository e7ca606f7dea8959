"""A small data set and two small models (`recfast_tiny`), also for processes that the tests start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A prepared folder of 600 rows: 30 users, 40 items; the even users click the even items."""
    import recfast_tiny

    return recfast_tiny.prepare(tmp_path_factory.mktemp("tiny") / "data").path


@pytest.fixture
def tiny_data(tiny_folder):
    from recfast import data

    return data.open(tiny_folder)


@pytest.fixture
def tiny_models(monkeypatch):
    """Make the small models known to `models.build`."""
    from recfast import models

    for name in ("TinyRanker", "TinyRetriever"):
        monkeypatch.setitem(models._PLACES, name, "recfast_tiny")
