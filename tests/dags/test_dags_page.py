"""docs/dags.md is what the DAGs say of themselves."""

from __future__ import annotations

from typing import Any


def test_the_page_of_the_dags_is_fresh(dags: dict[str, Any]) -> None:
    from crpbot_airflow.dags_page import COMMAND, FILE, page

    assert page(dags) == FILE.read_text(), f"docs/dags.md is stale; write it anew: {COMMAND}"
