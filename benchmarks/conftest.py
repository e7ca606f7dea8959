"""What the benchmarks share: check before timing, one thread and all, and a table of ratios at the end.

A benchmark names its case (`shape`) and the column it fills: `torch` (the torch form), `rival: <name>`, `ours`, or
`limit` (what the machine itself can do, measured in the same run). The table prints ns a unit of work and the ratios.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recfast import _C

# With --import-mode=importlib the folder of a benchmark is no place to import from.
sys.path.insert(0, str(Path(__file__).parent))

_RESULTS: dict[tuple[str, str, int], dict[str, float]] = defaultdict(dict)


@pytest.fixture(params=sorted({1, torch.get_num_threads()}), ids=lambda n: f"{n}thread")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def race(benchmark, threads):
    """Time several ways to do one piece of work, alternately, after all of them have been checked against the first.

    `race(op, shape, units, {column: function, ...}, check=...)`: `check(answer, column)` raises on a wrong result.
    The columns take turns, so that a noisy neighbour disturbs all alike, and take turns in going first, which may cost
    (the inputs of a round are then new to the cache); medians are kept. With `settle` a column is
    called so many times more before it is timed, as it is in a loop: otherwise it pays for the memory that the column
    before it gave back to the system, and for the cache that it filled with its own (which takes some calls to
    undo). pytest-benchmark gets the column `ours`.
    """

    def run(
        op: str,
        shape: str,
        units: int,
        ways: dict[str, Callable[[], object]],
        *,
        check: Callable[[object, str], None] | None = None,
        seconds: float = 1.0,
        settle: int = 0,
    ) -> dict[str, float]:
        for column, way in ways.items():
            answer = way()
            if check is not None and column != "limit":
                check(answer, column)
        times: dict[str, list[float]] = {column: [] for column in ways}
        end = time.perf_counter() + seconds
        order = list(ways.items())
        while time.perf_counter() < end or len(times["ours"]) < 7:
            order.append(order.pop(0))
            for column, way in order:
                for _ in range(settle):
                    way()
                start = time.perf_counter()
                way()
                times[column].append(time.perf_counter() - start)
        medians = {column: statistics.median(values) for column, values in times.items()}
        row = _RESULTS[op, shape, threads]
        row.update({column: value / units * 1e9 for column, value in medians.items()})
        benchmark.extra_info.update(op=op, shape=shape, threads=threads, ns_per_unit=row)
        benchmark.pedantic(ways["ours"], rounds=5, iterations=1, warmup_rounds=1)
        return medians

    return run


def machine_line() -> str:
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}; isa {_C.isa()}; torch {torch.__version__}; python {platform.python_version()}"


def pytest_terminal_summary(terminalreporter):
    if not _RESULTS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ns per unit of work (median), and how many times slower than ours")
    write(machine_line())
    for (op, shape, thread_count), row in sorted(_RESULTS.items()):
        ours = row["ours"]
        others = ", ".join(f"{name} {value:.3g} ({value / ours:.2f}x)" for name, value in row.items() if name != "ours")
        write(f"{op:<20} {shape:<36} {thread_count} thr: ours {ours:.3g}; {others}")
