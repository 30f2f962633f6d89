"""``crpbot models``: published versions, whether they fit today's features, and which of them the runtime follows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console
from rich.table import Table

from crpbot_lib import registry
from crpbot_lib.config import Settings, settings
from crpbot_lib.lake import Lake, LakeError
from crpbot_lib.market_data import MarketDataError
from crpbot_lib.runtime import RuntimeRefusedError, run
from crpbot_lib.training import marked

app = typer.Typer(no_args_is_help=True, help="Model versions: list, show, verify, promote, rollback, diff.")
Version = Annotated[str, typer.Argument(help="A version of `crpbot models list`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Published versions, oldest first, and what each symbol's champion is."""
    with clear_errors():
        config, lake = _open()
        versions = registry.list_versions(config, lake)
        champions = registry.champions(config, lake)
        for version in versions:
            version["promoted"] = [s for s in version["symbols"] if champions.get(s) == version["version"]]
        if as_json:
            typer.echo(json.dumps(versions))
            return
        if not versions:
            typer.echo(f"no published version under {lake.url(config.training.prefix)}")
            return
        table = Table("version", "trained", "gpu", "run", "symbol", "features", "accuracy", "promoted")
        for version in versions:
            for symbol, own in version["symbols"].items():
                table.add_row(
                    marked(version["version"], version["smoke"]),
                    version["trained_date"],
                    version["gpu"] or "none",
                    version["run"],
                    symbol,
                    str(own["input_size"]),
                    f"{own['accuracy']:.3f} ± {own['accuracy_se']:.3f}",
                    "yes" if symbol in version["promoted"] else "",
                )
        Console().print(table)


@app.command("show")
def show(version: Version, as_json: AsJson = False) -> None:
    """One version's manifest."""
    with clear_errors():
        manifest = registry.show(*_open(), version)
        if as_json:
            typer.echo(json.dumps(manifest))
            return
        smoke = manifest["smoke"]
        typer.echo(marked(f"{version}: run {manifest['run']}, trained {manifest['trained_date']}", smoke))
        typer.echo(marked(f"gpu {manifest['gpu'] or 'none'}, features {manifest['feature_version']}, {manifest['image']}", smoke))
        for symbol, entry in manifest["symbols"].items():
            m = entry["metrics"]
            line = (
                f"{symbol}: {entry['file']}, input_size {entry['input_size']}, catalog {entry['catalog']}, "
                f"accuracy {m['accuracy']:.3f} ± {m['accuracy_se']:.3f} (commoner side {m['majority_accuracy']:.3f}), "
                f"log loss {m['log_loss']:.4f} (base {m['base_log_loss']:.4f}), {m['train_windows']:,} windows, "
                f"{m['steps']:,} steps, {m['seconds']:.0f} s"
            )
            typer.echo(marked(line, smoke))


@app.command("verify")
def verify(version: Version, as_json: AsJson = False) -> None:
    """Read every model back: checksums, names, order, catalog hash and the three counts. Exits 1 with the differences."""
    with clear_errors():
        report = registry.verify(*_open(), version)
        if as_json:
            typer.echo(json.dumps(report))
            return
        for symbol, own in report["symbols"].items():
            counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in own["counts"].items())
            typer.echo(marked(f"{symbol}: {counts}; sha256 and catalog {own['catalog']} agree", report["smoke"]))


@app.command("promote")
def promote(version: Version, as_json: AsJson = False) -> None:
    """Dry-run the version, then let the runtime follow it. Exits 1 with every reason when it may not."""
    with clear_errors():
        config, lake = _open()
        evidence = run(config, lake, "dryrun", config.promotion.dry_run_iterations, version, emit=lambda s: typer.echo(s, err=True))
        _show(registry.promote(config, lake, version, evidence), as_json)


@app.command("rollback")
def rollback(as_json: AsJson = False) -> None:
    """Back to what was promoted before; again: one further back."""
    with clear_errors():
        _show(registry.rollback(*_open()), as_json)


@app.command("diff")
def diff(old: Version, new: Version, as_json: AsJson = False) -> None:
    """What differs between two versions: features, training parameters, metrics."""
    with clear_errors():
        found = registry.diff(*_open(), old, new)
        if as_json:
            typer.echo(json.dumps(found))
            return
        table = Table("what", old, new)
        for name, (a, b) in {**found["changed"], **{f"train.{k}": v for k, v in found["train"].items()}}.items():
            table.add_row(name, str(a), str(b))
        for symbol, own in found["symbols"].items():
            if "only_in" in own:
                table.add_row(symbol, *("yes" if own["only_in"] == v else "no" for v in (old, new)))
                continue
            for name, (a, b) in own["metrics"].items():
                table.add_row(f"{symbol} {name}", f"{a:.6g}", f"{b:.6g}")
            if own["features_removed"] or own["features_added"]:
                table.add_row(f"{symbol} features", *(", ".join(own[k]) for k in ("features_removed", "features_added")))
        Console().print(table)


def _open() -> tuple[Settings, Lake]:
    config = settings()
    return config, Lake(config.lake)


def _show(result: dict[str, Any], as_json: bool) -> None:
    typer.echo(json.dumps(result) if as_json else result["message"])


@contextmanager
def clear_errors() -> Iterator[None]:
    """An expected failure is one line on stderr and exit status 1, not a traceback."""
    try:
        yield
    except (
        registry.RegistryError,
        RuntimeRefusedError,
        MarketDataError,
        LakeError,
        ClientError,
        BotoCoreError,
        # FeatureError is one; so are an unknown symbol and a setting that is not valid
        ValueError,
    ) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
