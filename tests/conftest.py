"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A shared machine is slow at times; a deadline would only measure the neighbours. In CI the examples are always the
# same ones, so that a change is judged by what it changed; on a desk they are new each time.
settings.register_profile(
    "recfast",
    deadline=None,
    derandomize="CI" in os.environ,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("recfast")

# As the command line does: spinning threads and a busy neighbour make tests many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, which may not be copied into the project; skip where it is not."""
    path = Path(os.environ.get("RECFAST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("the real data sets are not here: set RECFAST_DATA to the folder that holds ml-100k, frappe, ...")
    return path


@pytest.fixture(scope="session")
def tiny_overrides() -> list[str]:
    """Settings of a cascade over the built-in data that takes a few seconds."""
    return [
        "data.options.rows=3000",
        "retriever.train.epochs=2",
        "retriever.options.dim=16",
        "ranker.train.epochs=1",
        "second_ranker.train.epochs=1",
        "compare_seeds=0",
    ]


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    """A folder for prepared data, so that no test writes to the user's own."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECFAST_CACHE", str(path))
        yield path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_overrides, data_cache) -> Path:
    """The folder of a finished run on 3,000 generated rows; not to be written to."""
    from recfast import cascade

    out = tmp_path_factory.mktemp("runs") / "tiny"
    said: list[str] = []
    config = cascade.settings(overrides=[*tiny_overrides, f"out={str(out)!r}"])
    assert cascade.run(config, command="recfast run", say=said.append) == out
    assert said[0] == "preparing the data"
    assert said[-1] == "writing the folder"
    return out


@pytest.fixture
def command(monkeypatch, capsys, data_cache):
    """Run the command line in this process: `command("recommend", ...)` -> (exit code, standard output, error)."""
    import sys

    from recfast import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recfast", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return (0 if code is None else code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(command):
    """Run the command line and expect wrong input: exit code 2 and one sentence, which is returned."""

    def run(*arguments: object) -> str:
        code, out, err = command(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("recfast: ")]
        assert (code, len(lines), out) == (2, 1, ""), (code, out, err)
        assert err.splitlines()[-1] == lines[0]
        assert "Traceback" not in err
        return lines[0]

    return run


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
