"""``crpbot gpu``: what lives, ending what should not, what it cost."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from crpbot_lib.cli.common import AsJson, clear_errors, open_lake, show_table
from crpbot_lib.config import settings
from crpbot_lib.gpu import budget, clients, instances, reap, terminate
from crpbot_lib.lake import Lake

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
    """Ends instances past their deadline and those that a later launch of their run has overtaken (all that can be known without
    Airflow), or all of one run with --run. For cron. Without CRPBOT_LAKE it does the same, but enters nothing into the ledger."""
    with clear_errors():
        current = settings()
        # the last resort must not hang on where the ledger is
        lake = Lake(current.lake) if current.lake or run else None
        gpu = current.gpu
        ec2 = clients.ec2(gpu.region)
        if lake is None:
            typer.echo("CRPBOT_LAKE is not set: the ledger is not brought up to date", err=True)
        rows: list[dict[str, Any]]
        if lake and run and dry_run:
            found = instances.find(ec2, gpu.project_tag, run, instances.ALIVE, lake=lake)
            rows = [{"id": i.id, "action": "terminate", "why": f"--run {run}", "state": i.state, "usd": None} for i in found]
        elif lake and run:
            living = {i.id for i in instances.find(ec2, gpu.project_tag, run, instances.ALIVE, lake=lake)}
            ended = terminate.terminate_run(ec2, lake, gpu, run)
            usd = {bill.id: bill.usd for entry in budget.settle(ec2, lake, ended) for bill in entry.bills}
            rows = [
                {
                    "id": i.id,
                    "action": "terminated" if i.id in living else "had ended",
                    "why": f"--run {run}",
                    "state": i.state,
                    "usd": usd.get(i.id),
                }
                for i in ended
            ]
        else:
            verdicts = reap.reap(ec2, lake, gpu, lambda _: None, dry_run=dry_run)
            rows = [
                {"id": v.instance.id, "action": v.action, "why": v.why, "state": v.instance.state, "usd": v.usd} for v in verdicts
            ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        came_to = f", came to ${row['usd']:.4f}" if row["usd"] is not None else ""
        typer.echo(f"{'would ' if dry_run and row['action'] != 'keep' else ''}{row['action']} {row['id']}: {row['why']}{came_to}")
    if not rows:
        typer.echo("nothing to reap")


@app.command("cost")
def cost_(
    run: Annotated[str, typer.Argument(help="name of the training run; without it every run that has a report")] = "",
    month: Annotated[str, typer.Option("--month", help="the ledger of one UTC month, e.g. 2026-11, against its cap")] = "",
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="first write the ledger anew from launch records, tags and spot price history")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What training runs cost: their reports, or with --month the ledger that the caps go by."""
    with clear_errors():
        if run and (month or rebuild):
            raise typer.BadParameter("a run has a report of its own; leave RUN out with --month or --rebuild")
        if month:
            _month(month)
        current, lake = open_lake()
        if rebuild:
            entries = budget.rebuild(clients.ec2(current.gpu.region), lake, current.gpu)
            if not month:
                months = sorted({entry.month for entry in entries})
                _show([budget.month_report(lake, current.gpu, name) for name in months], as_json)
                return
        if month:
            _show([budget.month_report(lake, current.gpu, month)], as_json, single=True)
            return
        bills = budget.reports(lake, run or None)
    if as_json:
        typer.echo(json.dumps(bills, indent=1))
        return
    table = Table("run", "instance", "type", "market", "billed s", "USD/h", "USD", "on demand", "saved", "price by", "state")
    for bill in bills:
        for row in bill["instances"]:
            table.add_row(
                bill["run"],
                row["id"],
                row["type"],
                row["market"],
                f"{row['billed_seconds']:.0f}",
                *(
                    f"{row[k]:.4f}" if row[k] is not None else "unknown"
                    for k in ("usd_per_hour", "usd", "on_demand_usd", "saved_usd")
                ),
                row["price_source"],
                row["state"],
            )
    show_table(table)
    paid, on_demand, saved = (sum(b[k] for b in bills) for k in ("usd", "on_demand_usd", "saved_usd"))
    typer.echo(f"total ${paid:.4f}, on demand ${on_demand:.4f}, saved ${saved:.4f}")


def _month(value: str) -> None:
    try:
        parsed = datetime.strptime(value, "%Y-%m").replace(tzinfo=UTC)
    except ValueError:
        parsed = None
    if parsed is None or f"{parsed:%Y-%m}" != value:
        raise typer.BadParameter(f"{value!r} is not a month; write it as 2026-11")


def _show(reports: list[dict[str, Any]], as_json: bool, *, single: bool = False) -> None:
    """The ledger's months, as tables or as one JSON value."""
    if as_json:
        typer.echo(json.dumps(reports[0] if single else reports, indent=1))
        return
    if not reports:
        typer.echo("the ledger is empty: nothing was launched from this lake")
    for report in reports:
        table = Table("run", "generation", "state", "billed s", "USD", "on demand", "saved", "counts as", title=report["month"])
        for row in report["launches"]:
            figures = (f"{row[k]:.4f}" for k in ("usd", "on_demand_usd", "saved_usd", "counted_usd"))
            table.add_row(row["run"], str(row["generation"]), row["state"], f"{row['billed_seconds']:.0f}", *figures)
        show_table(table)
        typer.echo(
            f"{report['month']}: paid ${report['usd']:.4f}, on demand ${report['on_demand_usd']:.4f}, saved "
            f"${report['saved_usd']:.4f}; ${report['counted_usd']:.4f} counts against the cap of ${report['max_month_usd']:.2f}"
        )
