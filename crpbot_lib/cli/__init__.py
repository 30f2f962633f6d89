"""``crpbot``: every step of the workflow as a command. Exit 0 only on success; errors go to stderr."""

from __future__ import annotations

import logging
import sys

import typer

from crpbot_lib.cli import data, features, gpu, models, runtime, sandbox

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="The retraining workflow, one command a step.")
app.add_typer(data.fetch, name="fetch")
app.command(name="coverage")(data.coverage)
app.add_typer(features.app, name="features")
app.add_typer(gpu.app, name="gpu")
app.add_typer(models.app, name="models")
app.command(name="runtime")(runtime.runtime)
app.command(name="demo")(sandbox.demo)


@app.callback()
def _main(verbose: bool = typer.Option(False, "--verbose", "-v", help="log what each step does, to stderr")) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(message)s")
