"""The self-test finds a kernel that is wrong, and says so by exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import recfast
from recfast import doctor
from recfast.ops import _library


def test_config_is_json_and_complete():
    config = json.loads(json.dumps(doctor.config()))
    assert config["recfast"] == recfast.__version__
    assert config["packages"]["torch"] == torch.__version__.split("+")[0] or config["packages"]["torch"]
    assert config["cpu"]["isa"] in ("scalar", "avx2", "avx512")
    assert config["cpu"]["threads"] == torch.get_num_threads()
    assert config["cuda"]["module"] in ("built", "not built")


def test_every_op_is_tested_and_right():
    results = doctor.self_test()
    assert {r.op for r in results} == {name for name, op in _library.REGISTRY.items() if op.expected is not None}
    assert {"embedding_bag", "din_attention", "code_search", "code_rows_search", "dpp_greedy"} <= {
        r.op for r in results
    }
    for result in results:
        assert result.error is None, result
        assert result.samples > 0


def test_a_wrong_kernel_is_found(monkeypatch, command):
    op = _library.REGISTRY["example_axpy"]
    wrong = type("Wrong", (), {"expected": lambda self, *a: op.expected(*a) + 1, "samples": op.samples})()
    wrong.overload = op.overload
    monkeypatch.setitem(_library.REGISTRY, "example_axpy", wrong)
    results = {r.op: r for r in doctor.self_test()}
    assert results["example_axpy"].error.startswith("sample 0: ")
    assert results["dpp_greedy"].error is None
    code, out, _ = command("doctor")
    assert code == 1
    assert "example_axpy" in out


def test_command(command):
    code, out, err = command("doctor")
    assert (code, err) == (0, "")
    assert recfast.__version__ in out
    assert "self-test:" in out
    code, out, _ = command("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["cpu"]["isa"] in ("scalar", "avx2", "avx512")
    assert all(test["error"] is None for test in found["self_test"])


@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_isa_may_be_lowered(level):
    environment = {**os.environ, "RECFAST_ISA": level}
    done = subprocess.run(
        [sys.executable, "-m", "recfast", "doctor", "--json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if found["cpu"]["isa_detected"] != "scalar":
        assert found["cpu"]["isa"] == level


def test_show_config(capsys):
    recfast.show_config()
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["recfast", recfast.__version__]
