"""The command line. Progress goes to standard error, results to standard output.

Exit code 0: done; 1: failed while working; 2: wrong input, with one sentence on standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import recfast
from recfast.errors import InputError

# Threads that wait by spinning halve each other's speed as soon as another program wants a core. Must be set before
# torch loads its OpenMP runtime; who sets it in the environment decides.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Train, measure and use recommenders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

bench = typer.Typer(help="Measure on your own data and machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")

Overrides = Annotated[
    list[str],
    typer.Option("-o", "--set", metavar="KEY=VALUE", help="Change one setting, such as ranker.train.lr=5e-4."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(recfast.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Train, measure and use recommenders."""


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Print versions, instruction set, threads, CUDA and the kernels, and test each kernel for a moment."""
    from recfast import doctor as checks

    config, tests = checks.config(), checks.self_test()
    if as_json:
        print(json.dumps({**config, "self_test": [vars(test) for test in tests]}, indent=2))
    else:
        print(checks.describe(config))
        print("self-test:")
        for test in tests:
            print(
                f"  {test.op:<17}{'ok' if test.error is None else test.error}"
                f" ({test.samples} samples, {test.milliseconds:.1f} ms)"
            )
    if any(test.error is not None for test in tests):
        raise typer.Exit(1)


@app.command()
def run(
    data: Annotated[
        str | None, typer.Option(help="synthetic (the default), ml-100k, or folder: a log of your own.")
    ] = None,
    path: Annotated[
        Path | None,
        typer.Option(
            help="The folder with the data set's files; of your own: schema.json, train.csv, valid.csv, test.csv."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in TOML, as config.toml of an earlier run.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; runs/<data> if left out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run in that folder.")] = False,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    as_json: AsJson = False,
) -> None:
    """Train and measure the cascade: retrieve, rank, re-rank. Writes a folder with report.html."""
    from recfast import cascade

    if config is not None and data is not None:
        raise InputError("run: --data and --config were both given, expected one of them")
    changes = list(overrides)
    for key, value in (("data.path", path), ("out", out), ("seed", seed)):
        if value is not None:
            changes.append(f"{key}={json.dumps(value if isinstance(value, int) else str(value))}")
    settings = cascade.settings(config, data, changes)
    command = " ".join(["recfast", *sys.argv[1:]])
    folder = cascade.run(settings, overwrite=overwrite, command=command, say=_progress)
    result = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    print(json.dumps(result, indent=2) if as_json else cascade.describe(result))
    _progress(f"wrote {folder / 'report.html'}")


@app.command()
def recommend(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `recfast run` wrote.")],
    users: Annotated[str, typer.Option(help="Raw user ids, separated by commas.")],
    k: Annotated[int, typer.Option(min=1, help="Items a user.")] = 10,
    cold: Annotated[
        str, typer.Option(help="For users without a history: error, or popular for the most liked items.")
    ] = "error",
    exclude: Annotated[
        str | None, typer.Option(help="What not to recommend again: seen, liked or nothing; as in the run if left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print recommendations for users, from a finished run."""
    from recfast.pipeline import Pipeline

    if cold not in ("error", "popular"):
        raise InputError(f"recommend: --cold must be error or popular, got {cold}")
    if exclude not in (None, "seen", "liked", "nothing"):
        raise InputError(f"recommend: --exclude must be seen, liked or nothing, got {exclude}")
    wanted = [user.strip() for user in users.split(",") if user.strip()]
    if not wanted:
        raise InputError(f"recommend: --users = {users!r} names nobody, expected raw user ids separated by commas")
    frame = Pipeline.load(run_folder / "pipeline").recommend(wanted, k, exclude=exclude, cold=cold)
    if as_json:
        print(frame.write_json())
    else:
        print("\t".join(frame.columns))
        for row in frame.iter_rows():
            print("\t".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row))


@app.command()
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `recfast run` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Print what a finished run measured."""
    from recfast import cascade
    from recfast.models.storage import read_json

    result = read_json(run_folder / "metrics.json")
    try:
        text = json.dumps(result, indent=2) if as_json else cascade.describe(result)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"evaluate: {run_folder / 'metrics.json'} is not of a finished run, expected the figures of a cascade"
        ) from None
    print(text)


@bench.command()
def retrieval(
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A folder that `recfast run` wrote: its items and users.")
    ] = None,
    items: Annotated[Path | None, typer.Option(help="Vectors of items instead, a .npy file [N, D].")] = None,
    queries: Annotated[Path | None, typer.Option(help="Vectors to search for, a .npy file [Q, D].")] = None,
    n_items: Annotated[int, typer.Option(help="Without either: how many items to generate.")] = 100_000,
    dim: Annotated[int, typer.Option(help="Without either: of how many dimensions.")] = 64,
    n_queries: Annotated[int, typer.Option(min=1, help="Users to draw, or queries to generate.")] = 1024,
    k: Annotated[int, typer.Option(help="Best items wanted.")] = 100,
    threads: Annotated[int | None, typer.Option(help="What all threads are; one is always measured.")] = None,
    batch: Annotated[int, typer.Option(help="Queries a call, beside one.")] = 256,
    limit: Annotated[float, typer.Option(help="Seconds after which nothing new is begun.")] = 600.0,
    seconds: Annotated[float, typer.Option(help="For each figure of queries per second.")] = 0.3,
    only: Annotated[str, typer.Option(help="Parts of names, separated by commas: who takes part.")] = "",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder for retrieval.json and retrieval.png.")] = Path(
        "runs/bench-retrieval"
    ),
    as_json: AsJson = False,
) -> None:
    """Measure recall against queries per second of every index, and draw it."""
    from recfast.bench import retrieval as measure

    if (items is None) != (queries is None):
        given, wanted = ("--items", "--queries") if queries is None else ("--queries", "--items")
        raise InputError(f"bench retrieval: {given} was given without {wanted}, expected both or neither")
    if run_folder is not None and items is not None:
        raise InputError("bench retrieval: RUN and --items were both given, expected one of them")
    if run_folder is not None:
        problem = measure.from_run(run_folder, n_queries, k, seed)
    elif items is not None:
        problem = measure.from_files(items, queries, k, seed)
    else:
        problem = measure.generated(n_items, dim, n_queries, k, seed)
    names = [name.strip() for name in only.split(",") if name.strip()]
    result = measure.run(problem, threads=threads, batch=batch, limit=limit, seconds=seconds, only=names, say=_progress)
    folder = measure.write(out, result)
    print(json.dumps(result, indent=2) if as_json else measure.describe(result))
    _progress(f"wrote {folder / 'retrieval.json'} and {folder / 'retrieval.png'}")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line and turn errors into one sentence and an exit code."""
    try:
        app()
    except InputError as error:
        print(f"recfast: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if os.environ.get("RECFAST_DEBUG"):
            raise
        print(
            f"recfast: failed: {type(error).__name__}: {error} (set RECFAST_DEBUG=1 to see where)",
            file=sys.stderr,
        )
        sys.exit(1)
