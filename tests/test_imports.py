"""Imports go one way: _C, _cuda <- ops <- nn, index, rerank <- models <- train, pipeline <- serve, cli."""

import ast
from pathlib import Path

import recfast

SOURCE = Path(recfast.__file__).parent
EVERYONE = {"errors", "files"}
BELOW_NN = {"_C", "_cuda", "ops"}
BELOW_MODELS = BELOW_NN | {"nn", "index", "rerank", "data", "metrics"}
BELOW_TRAIN = BELOW_MODELS | {"models"}
BELOW_CLI = BELOW_TRAIN | {"train", "pipeline", "cascade", "report", "doctor", "bench"}
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "data": {"metrics"},
    "metrics": {"data"},
    "ops": {"_C", "_cuda"},
    "nn": BELOW_NN | {"data"},
    "index": BELOW_NN,
    "rerank": BELOW_NN,
    "models": BELOW_MODELS,
    "train": BELOW_TRAIN,
    "pipeline": BELOW_TRAIN | {"train"},
    "doctor": BELOW_NN,
    "cascade": BELOW_CLI,
    "report": BELOW_CLI,
    "bench": BELOW_TRAIN | {"pipeline", "report", "doctor"},
    "cli": BELOW_CLI,
    "__init__": BELOW_CLI,
    "__main__": {"cli"},
}


def imported_parts(path: Path) -> set[str]:
    """The first-level parts of recfast that a file names in an import statement, lazily or not."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            # `from recfast import nn` names the part in its alias.
            names = [f"recfast.{alias.name}" for alias in node.names] if node.module == "recfast" else [node.module]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("recfast.")}
    return parts


def test_imports_go_one_way():
    for path in sorted(SOURCE.rglob("*.py")):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        assert part in ALLOWED, f"{part} has no place in the order of imports yet: give it one in ALLOWED"
        wrong = imported_parts(path) - ALLOWED[part] - EVERYONE - {part}
        assert not wrong, f"{path.relative_to(SOURCE)} may not import {', '.join(sorted(wrong))}"


def test_data_and_metrics_know_no_kernel():
    """They can be used, and tested, where nothing has been compiled."""
    assert not (ALLOWED["data"] | ALLOWED["metrics"]) & (BELOW_NN | {"nn", "models"})
