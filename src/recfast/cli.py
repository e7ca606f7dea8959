"""The command line. Progress goes to standard error, results to standard output.

Exit code 0: done; 1: failed while working; 2: wrong input, with one sentence on standard error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

import recfast
from recfast.errors import InputError

app = typer.Typer(
    help="Train, measure and use recommenders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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
