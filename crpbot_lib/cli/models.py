"""``crpbot models``: published versions, whether they fit today's features, and which of them the runtime follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from crpbot_lib import registry
from crpbot_lib.cli.common import AsJson, clear_errors, open_lake, show_table
from crpbot_lib.cli.runtime import At, as_of
from crpbot_lib.runtime import run
from crpbot_lib.training import accuracy_words, marked

app = typer.Typer(no_args_is_help=True, help="Model versions: list, show, verify, download, promote, rollback, diff.")
Version = Annotated[str, typer.Argument(help="A version of `crpbot models list`.")]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Published versions, oldest first, and what each symbol's champion is."""
    with clear_errors():
        config, lake = open_lake()
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
        table = Table("version", "trained", "gpu", "run", "symbol", "features", "accuracy", "skill", "promoted")
        for version in versions:
            for symbol, own in version["symbols"].items():
                table.add_row(
                    marked(version["version"], version["smoke"]),
                    version["trained_date"],
                    version["gpu"] or "none",
                    version["run"],
                    symbol,
                    str(own["input_size"]),
                    accuracy_words(own),
                    {True: "shown", False: "none shown", None: "unknown"}[own["skill"]],
                    "yes" if symbol in version["promoted"] else "",
                )
        show_table(table)


@app.command("show")
def show(version: Version, as_json: AsJson = False) -> None:
    """One version's manifest."""
    with clear_errors():
        manifest = registry.show(*open_lake(), version)
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
                f"accuracy {accuracy_words(m)}, commoner side {m['majority_accuracy']:.3f}, "
                f"log loss {m['log_loss']:.4f} (base {m['base_log_loss']:.4f}), {m['train_windows']:,} windows, "
                f"{m['steps']:,} steps, {m['seconds']:.0f} s; {m.get('verdict', 'no verdict')}"
            )
            typer.echo(marked(line, smoke))


@app.command("verify")
def verify(version: Version, as_json: AsJson = False) -> None:
    """Read every model back: checksums, names, order, catalog hash and the three counts. Exits 1 with the differences."""
    with clear_errors():
        report = registry.verify(*open_lake(), version)
        if as_json:
            typer.echo(json.dumps(report))
            return
        for symbol, own in report["symbols"].items():
            counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in own["counts"].items())
            typer.echo(marked(f"{symbol}: {counts}; sha256 and catalog {own['catalog']} agree", report["smoke"]))


@app.command("download")
def download(
    version: Version,
    to: Annotated[Path, typer.Option(help="Folder for the checkpoints and the manifest; made where it is missing.")],
    as_json: AsJson = False,
) -> None:
    """The version's checkpoints and manifest as files, their checksums verified."""
    with clear_errors():
        paths = [str(path) for path in registry.download(*open_lake(), version, to)]
    typer.echo(json.dumps(paths) if as_json else "\n".join(paths))


@app.command("promote")
def promote(version: Version, at: At = None, as_json: AsJson = False) -> None:
    """Dry-run the version, then let the runtime follow it. Exits 1 with every reason when it may not."""
    with clear_errors():
        config, lake = open_lake()
        config = as_of(config, at)
        # a dry run takes minutes: what is refused whatever it shows is refused before it
        registry.check_promotable(config, lake, version)
        evidence = run(config, lake, "dryrun", config.promotion.dry_run_iterations, version, emit=lambda s: typer.echo(s, err=True))
        _show(registry.promote(config, lake, version, evidence), as_json)


@app.command("rollback")
def rollback(as_json: AsJson = False) -> None:
    """Back to what was promoted before; again: one further back."""
    with clear_errors():
        _show(registry.rollback(*open_lake()), as_json)


@app.command("diff")
def diff(old: Version, new: Version, as_json: AsJson = False) -> None:
    """What differs between two versions: features, training parameters, metrics."""
    with clear_errors():
        found = registry.diff(*open_lake(), old, new)
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
        show_table(table)


def _show(result: dict[str, Any], as_json: bool) -> None:
    typer.echo(json.dumps(result) if as_json else result["message"])
