"""``crpbot``: every step of the workflow as a command. Exit 0 only on success; errors go to stderr."""

from __future__ import annotations

import logging
import sys

import typer

from crpbot_lib.cli.data import check, coverage, fetch, gaps
from crpbot_lib.cli.features import app as features
from crpbot_lib.cli.gpu import app as gpu
from crpbot_lib.cli.models import app as models
from crpbot_lib.cli.runtime import runtime
from crpbot_lib.cli.sandbox import demo

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="The retraining workflow, one command a step.")
app.add_typer(fetch, name="fetch")
app.command()(coverage)
app.command()(gaps)
app.command()(check)
app.add_typer(features, name="features")
app.add_typer(gpu, name="gpu")
app.add_typer(models, name="models")
app.command()(runtime)
app.command()(demo)


@app.callback()
def _main(verbose: bool = typer.Option(False, "--verbose", "-v", help="log what each step does, to stderr")) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(message)s")
