"""``python -m tests.fault_matrix``: every fault at every phase of a run, and a table of which layer ended its instance."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fault_matrix import cells
from tests.fault_matrix.matrix import LONGEST_LIFE, MatrixError, Result, run_matrix

STATE = Path(".crpbot/fault-matrix")


def tables(results: Sequence[Result]) -> list[Table]:
    """The grid, phases by faults, and a row a cell."""
    by_cell = {result.cell: result for result in results}
    faults = [fault for fault in cells.FAULTS if any(cells.Cell(phase, fault).key in by_cell for phase in cells.PHASES)]
    grid = Table(
        "fault", *(phase.name for phase in cells.PHASES), title="Layer that ended each instance, and seconds to none alive"
    )
    for fault in faults:
        row = []
        for phase in cells.PHASES:
            key = cells.Cell(phase, fault).key
            result = by_cell.get(key)
            text = (
                "n/a"
                if key in cells.CANNOT_RUN
                else ""
                if result is None
                else f"{'+'.join(result.layers) or '-'} {result.seconds:.0f} s"
            )
            row.append(f"[red]{text} WRONG[/]" if result and result.wrong else text)
        grid.add_row(fault.name, *row)
    each = Table("cell", "run", "ended by", "seconds to zero", "attempts", "longest life s", "wrong", title="Cells")
    for r in results:
        numbers = (f"{r.seconds:.0f}", str(r.attempts), f"{r.longest_life:.0f}")
        each.add_row(r.cell, r.run_state, ", ".join(r.layers) or "no instance", *numbers, "; ".join(r.wrong))
    return [each, grid]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault_matrix", description=__doc__)
    parser.add_argument("--short", action="store_true", help="one fault a phase and the kills of what all runs share: minutes")
    parser.add_argument("--fresh", action="store_true", help="forget the cells that an earlier, interrupted matrix has finished")
    parser.add_argument("--at-once", type=int, default=7, help="runs side by side")
    parser.add_argument("--only", default="", help="cells whose name contains this text")
    parser.add_argument("--state", type=Path, default=STATE, help="directory of results and logs")
    parser.add_argument("--json", action="store_true", help="the results as JSON, without the tables")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170, stderr=options.json)
    began = time.monotonic()

    def say(text: str) -> None:
        seconds = int(time.monotonic() - began)
        console.out(f"[{seconds // 60:02d}:{seconds % 60:02d}] {text}", highlight=False)

    if options.fresh and options.state.exists():
        shutil.rmtree(options.state)
    chosen = [cell for cell in (cells.SHORT if options.short else cells.CELLS) if options.only in cell.key]
    try:
        results = run_matrix(options.state.resolve(), chosen, say, at_once=options.at_once)
    except MatrixError as error:
        say(f"FAILED: {error}; what is finished is kept, run it again to go on")
        return 1
    if options.json:
        sys.stdout.write(json.dumps([asdict(result) for result in results]) + "\n")
    else:
        for table in tables(results):
            console.print(table)
        console.out(
            "Layers: 1 teardown, 2 the job's end, 3 the instance's deadline, 4 reaper, 5 dead-man's switch; retry: the next try"
        )
        console.out("of a task replaced the instance; spot: EC2 took it back. Cells that cannot be run:")
        for key, why in cells.CANNOT_RUN.items():
            console.out(f"  {key}: {why}")
    wrong = [result for result in results if result.wrong]
    say(f"{len(results)} cells, {len(wrong)} wrong; no instance outlives {LONGEST_LIFE:.0f} s; results in {options.state}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
