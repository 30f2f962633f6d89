"""``docs/dags.md``, written from the DAGs themselves: the page that the operator reads in the UI, the schedule, the tasks in order.

``PYTHONPATH=plugins .venv/bin/python -m crpbot_airflow.dags_page`` writes it anew; a test says when it is stale.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = REPOSITORY / "docs" / "dags.md"
COMMAND = "PYTHONPATH=plugins .venv/bin/python -m crpbot_airflow.dags_page"


def page(dags: Mapping[str, Any]) -> str:
    """The whole page for the DAGs by id; equal DAGs give equal text."""
    known = sorted(dags.items())
    rows = "\n".join(f"| [`{name}`](#{name}) | {_schedule(dag)} | {', '.join(sorted(dag.tags))} |" for name, dag in known)
    sections = "\n\n".join(_section(dag) for _, dag in known)
    return f"""# DAGs

Written by `{COMMAND}`; a test keeps it fresh.

| DAG | schedule (UTC) | tags |
|---|---|---|
{rows}

With the setting `orchestration.schedules` off, as in the demonstration, data and training run by hand or by event only; the
reaper keeps its schedule. A *mapped* task runs once per symbol.

{sections}
"""


def _section(dag: Any) -> str:
    lines = [
        f"#{dag.doc_md.strip()}",  # its title, one level down
        "",
        "| task | after | what it is |",
        "|---|---|---|",
    ]
    for task in dag.topological_sort():
        after = ", ".join(f"`{name}`" for name in sorted(task.upstream_task_ids))
        lines.append(f"| `{task.task_id}` | {after} | {_kind(task)} |")
    return "\n".join(lines)


def _schedule(dag: Any) -> str:
    timetable = dag.timetable
    if expression := getattr(timetable, "expression", None):
        one_day = "; a run is one day, named by its partition key" if hasattr(timetable, "key_format") else ""
        return f"`{expression}`{one_day}"
    if delta := getattr(timetable, "delta", None):
        return f"every {delta.total_seconds() / 60:g} min"
    if condition := timetable.asset_condition:
        return f"after an update of {', '.join(f'`{asset.name}`' for asset in condition.objects)}"
    return "none"


def _kind(task: Any) -> str:
    what = ["Python" if task.task_type == "_PythonDecoratedOperator" else f"`{task.task_type}`"]
    what += [
        word for word, holds in (("mapped", task.is_mapped), ("setup", task.is_setup), ("teardown", task.is_teardown)) if holds
    ]
    if not task.is_teardown and task.trigger_rule.value != "all_success":
        what.append(f"trigger rule `{task.trigger_rule.value}`")
    what += [f"updates `{asset.name}`" for asset in task.outlets]
    return ", ".join(what)


def main() -> None:
    """Writes the page of this repository's DAGs, parsed under default settings, in an Airflow home of its own."""
    with tempfile.TemporaryDirectory() as home:
        # before anything imports Airflow, which reads its configuration once
        for name in [name for name in os.environ if name.startswith(("AIRFLOW", "CRPBOT_"))]:
            del os.environ[name]
        os.environ |= {
            "AIRFLOW_HOME": home,
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "plugins"),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        }
        from airflow.dag_processing.dagbag import DagBag

        bag = DagBag(REPOSITORY / "dags")
        if bag.import_errors:
            sys.exit(f"the DAGs do not import: {bag.import_errors}")
        FILE.write_text(page(bag.dags))


if __name__ == "__main__":
    main()
