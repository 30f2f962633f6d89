"""``crpbot gpu``: what lives, ending what should not, what it cost."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from crpbot_lib.cli.common import AsJson, clear_errors, open_lake, show_table
from crpbot_lib.config import settings
from crpbot_lib.gpu import clients, cost, instances, reap, terminate

app = typer.Typer(no_args_is_help=True, help="GPU instances: list, reap, cost.")


@app.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="ended ones too, as long as EC2 remembers them")] = False,
    as_json: AsJson = False,
) -> None:
    """Instances of this project. Exits 0 whether there are any or not; an AWS error is an error."""
    states = (*instances.ALIVE, *instances.ENDING) if everything else instances.ALIVE
    with clear_errors():
        gpu = settings().gpu
        found = instances.find(clients.ec2(gpu.region), gpu.project_tag, states=states)
    if as_json:
        rows = [
            {
                "id": i.id,
                "type": i.type,
                "market": i.market,
                "state": i.state,
                "run": i.run,
                "generation": i.generation,
                "launched_at": i.launched_at.isoformat(),
                "deadline": i.deadline.isoformat() if i.deadline else None,
            }
            for i in found
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    if not found:
        typer.echo(f"no {'known' if everything else 'living'} instance tagged {instances.TAG_PROJECT}={gpu.project_tag}")
        return
    table = Table("instance", "type", "market", "state", "age", "deadline", "run")
    at = datetime.now(UTC)
    for i in found:
        age = f"{((i.ended_at or at) - i.launched_at).total_seconds() / 60:.1f} min"
        table.add_row(i.id, i.type, i.market, i.state, age, i.deadline.isoformat() if i.deadline else "none", i.run)
    show_table(table)


@app.command("reap")
def reap_(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, do nothing")] = False,
    run: Annotated[str, typer.Option("--run", help="end every instance of this run in this lake now, and wait for it")] = "",
    as_json: AsJson = False,
) -> None:
    """Ends instances past their deadline (all that can be known without Airflow), or all of one run with --run. For cron."""
    with clear_errors():
        current, lake = open_lake()
        gpu = current.gpu
        ec2 = clients.ec2(gpu.region)
        if run and not dry_run:
            living = {i.id for i in instances.find(ec2, gpu.project_tag, run, instances.ALIVE, lake=lake)}
            ended = terminate.terminate_run(ec2, lake, gpu, run)
            rows = [
                {"id": i.id, "action": "terminated" if i.id in living else "had ended", "why": f"--run {run}", "state": i.state}
                for i in ended
            ]
        else:
            verdicts = reap.reap(ec2, lake, gpu, lambda _: None, dry_run=dry_run)
            rows = [
                {"id": v.instance.id, "action": v.action, "why": v.why, "state": v.instance.state}
                for v in verdicts
                if not run or v.instance.run == run
            ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        typer.echo(f"{'would ' if dry_run and row['action'] != 'keep' else ''}{row['action']} {row['id']}: {row['why']}")
    if not rows:
        typer.echo("nothing to reap")


@app.command("cost")
def cost_(
    run: Annotated[str, typer.Argument(help="name of the training run; without it every run that has a report")] = "",
    as_json: AsJson = False,
) -> None:
    """The recorded cost of one training run, or of all."""
    with clear_errors():
        _, lake = open_lake()
        bills = cost.reports(lake, run or None)
    if as_json:
        typer.echo(json.dumps(bills, indent=1))
        return
    table = Table("run", "instance", "type", "market", "seconds", "USD/h", "USD", "on demand", "state")
    for bill in bills:
        for row in bill["instances"]:
            table.add_row(
                bill["run"],
                row["id"],
                row["type"],
                row["market"],
                f"{row['seconds']:.0f}",
                *(f"{row[k]:.4f}" if row[k] is not None else "unknown" for k in ("usd_per_hour", "usd", "on_demand_usd")),
                row["state"],
            )
    show_table(table)
    typer.echo(f"total ${sum(b['usd'] for b in bills):.4f}, on demand ${sum(b['on_demand_usd'] for b in bills):.4f}")
