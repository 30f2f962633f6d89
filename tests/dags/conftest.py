"""The DAG bag, parsed once, from the repository's own folders, with an Airflow home of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def airflow_environment(home: Path) -> dict[str, str]:
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "CRPBOT_LAKE": f"file://{home / 'lake'}",
    }


@pytest.fixture(scope="session")
def airflow_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that uses Airflow on this repository, with a migrated database."""
    home = tmp_path_factory.mktemp("airflow")
    env = {**os.environ, **airflow_environment(home)}
    airflow = Path(sys.executable).with_name("airflow")
    subprocess.run([airflow, "db", "migrate"], env=env, check=True, capture_output=True, timeout=240)
    return env


@pytest.fixture(scope="session")
def dags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """DAG id -> DAG, as the dag-processor parses them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in airflow_environment(tmp_path_factory.mktemp("parse")).items():
            patch.setenv(name, value)
        patch.syspath_prepend(str(REPOSITORY / "plugins"))
        from airflow.dag_processing.dagbag import DagBag

        bag = DagBag(REPOSITORY / "dags")
        assert bag.import_errors == {}
        yield dict(bag.dags)
