"""Searches in many threads at the same time, under ThreadSanitizer."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recfast import _C

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
KERNELS = ("common", "code_search", "code_postings", "code_rows")
RACE_FOUND = 66

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiler():
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if not found or not (ROOT / "csrc").is_dir():
        pytest.skip("there is no C++ compiler, or no source beside the tests")
    return found.split()


def run(command, **options):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


def execute(program, isa="avx512"):
    """Run with what ThreadSanitizer needs; skip where its runtime cannot start at all."""
    environment = {**os.environ, "TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE_FOUND}", "RECFAST_ISA": isa}
    # Some kernels spread memory wider than older runtimes can follow; without randomisation they start.
    steady = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    if steady and run([*steady, "true"]).returncode:
        steady = []
    done = run([*steady, program], env=environment, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run here: unexpected memory mapping")
    return done


@pytest.fixture(scope="module")
def build(compiler, tmp_path_factory):
    """`build(*flags)` makes the program, its kernels only once."""
    folder = tmp_path_factory.mktemp("threads")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if run([*compiler, "-fsanitize=thread", probe, "-o", folder / "probe"]).returncode:
        pytest.skip("the compiler has no ThreadSanitizer runtime")
    execute(folder / "probe")
    flags = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fsanitize=thread", f"-I{ROOT / 'csrc'}"]

    def compile_one(source, name, *more):
        done = run([*compiler, *flags, *more, "-c", source, "-o", folder / name])
        assert done.returncode == 0, done.stderr
        return folder / name

    sources = [source for kernel in KERNELS for source in sorted((ROOT / "csrc" / kernel).glob("*.cpp"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources, [f"{source.stem}.o" for source in sources]))

    def make(name, *more):
        own = compile_one(HERE / "concurrent_search.cpp", f"{name}.o", *more)
        done = run([*compiler, "-fsanitize=thread", own, *objects, "-pthread", "-o", folder / name])
        assert done.returncode == 0, done.stderr
        return folder / name

    return make


def test_searches_do_not_race(build, isa_levels):
    program = build("searches")
    for level in isa_levels():
        done = execute(program, level)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [level]
        assert "WARNING" not in done.stderr


def test_a_race_is_found(build):
    """A change without the lock is what ThreadSanitizer must report: the test above can fail."""
    done = execute(build("race", "-DRECFAST_DELIBERATE_RACE"), _C.detected_isa())
    assert done.returncode == RACE_FOUND, (done.returncode, done.stderr)
    assert "data race" in done.stderr
    assert "concurrent_search.cpp" in done.stderr
