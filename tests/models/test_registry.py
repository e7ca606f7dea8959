"""Models by name."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from recfast import models
from recfast.errors import InputError


@pytest.fixture
def known(monkeypatch):
    """A registry entry whose module is made here."""
    module = types.ModuleType("recfast_known")

    class Known:
        def __init__(self, schema, *, dim=4, dropout=0.0):
            self.schema, self.dim, self.dropout = schema, dim, dropout

    module.Known = Known
    monkeypatch.setitem(sys.modules, "recfast_known", module)
    monkeypatch.setitem(models._PLACES, "Known", "recfast_known")
    return Known


def test_build(known):
    built = models.build("Known", "schema", {"dim": 8})
    assert (type(built), built.schema, built.dim, built.dropout) == (known, "schema", 8, 0.0)
    assert models.Known is known
    assert models.build("Known", "schema").dim == 4


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DeepFN", {}, "models.build: model 'DeepFN' is unknown, did you mean 'DeepFM'?"),
        ("deepfm", {}, "model 'deepfm' is unknown, did you mean 'DeepFM'?"),
        ("zzz", {}, "model 'zzz' is unknown, expected one of DARE, DCNv2, DIN, DSSM, DeepFM, EASE, ETA"),
        ("Known", {"dimm": 1}, "models.build: Known has no option 'dimm', did you mean 'dim'?"),
        ("Known", {"schema": 1}, "Known has no option 'schema', expected one of dim, dropout"),
    ],
)
def test_unknown_names(known, name, config, message):
    with pytest.raises(InputError) as caught:
        models.build(name, None, config)
    assert message in str(caught.value)


def test_an_attribute_that_is_no_model():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = models.Nothing


def test_nothing_is_imported_before_it_is_asked_for():
    code = (
        "import sys; from recfast import models; assert {'DIN', 'SimpleX'} <= set(dir(models));"
        "sys.exit(any(m.startswith('recfast.models.') or m == 'torch' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
