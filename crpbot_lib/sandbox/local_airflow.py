"""A whole Airflow on this machine: database, scheduler, dag-processor, triggerer and API server as real processes.

For the demo and the tests. Each component is a process in a session of its own that dies with this one; what they started in turn
is found again by a marker in its environment and ended by pid. Talks to Airflow only through its REST API (v2).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from crpbot_lib.sandbox import processes

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
COMPONENTS: dict[str, tuple[str, ...]] = {
    # logs are read from this machine's files: no log servers, whose ports are fixed and open to all interfaces
    "scheduler": ("--skip-serve-logs",),
    "dag-processor": (),
    "triggerer": ("--skip-serve-logs",),
    "api-server": (),
}
USER = "admin"
ENDED = ("success", "failed")
_ATTEMPTS = 8
_RESTARTS = 5
"""Of one component, after which it is not busy but broken."""


class AirflowError(Exception):
    """Airflow did not start, or answered with an error; the message says where its logs are."""


class LocalAirflow:
    """One Airflow home under ``home``. ``env`` is what its tasks see besides (the local cloud's endpoints, settings); ``marker``
    names everything that it starts; ``dags`` is the folder of its DAGs.

    Use as a context manager; ``stop`` ends every process that it or its components started.
    """

    def __init__(self, home: Path, env: dict[str, str], port: int = 0, marker: str = "", dags: Path = REPOSITORY / "dags") -> None:
        self.home, self.dags = home.resolve(), dags
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.password = secrets.token_urlsafe(12)
        self.marker = marker or f"airflow-{uuid.uuid4().hex}"
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self.died: list[str] = []
        """The components that ended by themselves and were started anew, and the last line that each wrote."""
        self._http = requests.Session()
        # no proxy stands between here and this machine's own Airflow
        self._http.trust_env = False
        self.env = self._environment(env)

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        # nothing of the caller's own Airflow or AWS configuration may leak in; without bytecode each task compiles Airflow anew
        left_out = ("AIRFLOW", "AWS_", "CRPBOT_", "PYTHONDONTWRITEBYTECODE")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        return {
            **inherited,
            "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(self.home / "logs"),
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.dags),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "plugins"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "4",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self.home / "passwords.json"),
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self.port),
            "AIRFLOW__API__BASE_URL": self.url,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": secrets.token_hex(16),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
            # with the default of 5 s a busy machine gives errors; much longer, and a request would outlast its client's patience
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{self.home / 'airflow.db'}?timeout=15",
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
            "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "2",
            "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
            "AIRFLOW__SCHEDULER__ENABLE_TRACEMALLOC": "False",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
            "AWS_EC2_METADATA_DISABLED": "true",
            "SCARF_ANALYTICS": "false",
            "PYTHONUNBUFFERED": "1",
            # Airflow renames its processes, and by default that overwrites the environment by which ours are found again
            "SPT_NOENV": "1",
            **extra,
        }

    def start(self, timeout: float = 120) -> None:
        """Migrates the database, starts the components and waits until all are healthy; AirflowError after ``timeout`` s."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError as error:
                raise AirflowError(f"port {self.port} of 127.0.0.1 is in use; choose another with --port") from error
        self.home.mkdir(parents=True, exist_ok=True)
        passwords = self.home / "passwords.json"
        passwords.touch(mode=0o600)
        passwords.write_text(json.dumps({USER: self.password}))
        try:
            self._run("db", "migrate")
            for name in COMPONENTS:
                self.start_component(name)
            self._wait_healthy(timeout)
        except BaseException:
            self.stop()
            raise

    def start_component(self, name: str) -> None:
        """Starts one component; its output goes to ``<home>/<name>.log``."""
        with (self.home / f"{name}.log").open("ab") as out:
            self._children[name] = processes.spawn(
                [_airflow(), name, *COMPONENTS[name]], env=self.env, stdout=out, stderr=out, cwd=self.home, marker=self.marker
            )

    def component_pids(self) -> list[int]:
        """Of the components themselves, not of what they started."""
        return [child.pid for child in self._children.values()]

    def kill_component(self, name: str) -> None:
        """SIGKILL to one component and to it alone; what it started goes on, as it does on a machine."""
        child = self._children.pop(name)
        child.kill()
        child.wait(timeout=30)

    def keep_up(self) -> None:
        """Starts the components anew that have ended by themselves, as a service manager would: a triggerer, for one, ends when
        SQLite lets it wait for too long. AirflowError when one does so again and again."""
        for name, child in list(self._children.items()):
            if child.poll() is None:
                continue
            last = _tail(self.home / f"{name}.log")
            self.died.append(f"airflow {name} ended with {child.returncode}: {last.splitlines()[-1]}")
            if sum(one.startswith(f"airflow {name} ") for one in self.died) > _RESTARTS:
                raise AirflowError(f"airflow {name} ended {_RESTARTS + 1} times, the last time with {child.returncode}: {last}")
            self.start_component(name)

    def stop(self) -> None:
        """Ends every component and whatever they started; idempotent."""
        try:
            for child in self._children.values():
                processes.end_group(child.pid, grace=1)
                child.wait(timeout=30)
        finally:
            self._children.clear()
            # task processes are in sessions of their own; the scheduler is gone, so nothing starts anew while they are ended
            end_marked(self.marker)

    def __enter__(self) -> LocalAirflow:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # what a user does in the UI

    def import_errors(self) -> list[dict[str, Any]]:
        return list(self._get("importErrors")["import_errors"])

    def unpause(self, dag: str) -> None:
        self._request("PATCH", f"dags/{dag}", {"is_paused": False})

    def put_connection(self, name: str, kind: str, **fields: Any) -> None:
        """Stores a Connection in Airflow's database, or changes the ``fields`` that are named of the one that is there."""
        body = {"connection_id": name, "conn_type": kind, **fields}
        if name in {found["connection_id"] for found in self._get("connections", limit=100)["connections"]}:
            self._request("PATCH", f"connections/{name}", body, {"update_mask": list(fields)})
        else:
            self._request("POST", "connections", body, known=409)

    def trigger(self, dag: str, *, conf: dict[str, Any] | None = None, partition_key: str | None = None) -> str:
        """Starts a run and returns its id."""
        # named here, so that asking again after a lost answer starts no second run
        name = f"manual__{datetime.now(UTC).isoformat(timespec='seconds')}_{uuid.uuid4().hex[:6]}"
        body: dict[str, Any] = {"dag_run_id": name, "logical_date": None, "conf": conf or {}}
        if partition_key is not None:
            body["partition_key"] = partition_key
        self._request("POST", f"dags/{dag}/dagRuns", body, known=409)
        return name

    def backfill(self, dag: str, first: date, last: date, *, parallel: int = 4, backwards: bool = False) -> None:
        """Starts a backfill of the partitions of the UTC days ``first`` to ``last``, both included, whether they have run or not.

        Its runs, at most ``parallel`` at once, appear in ``runs`` with ``run_type`` "backfill".
        """
        body = {
            "dag_id": dag,
            "from_date": f"{first}T00:00:00Z",
            # a partition's date is its cron tick, not midnight: the last day must be asked for to its end
            "to_date": f"{last}T23:59:59Z",
            "run_backwards": backwards,
            "reprocess_behavior": "completed",
            "max_active_runs": parallel,
        }
        # 409: this one is under way already
        self._request("POST", "backfills", body, known=409)

    def runs(self, dag: str) -> list[dict[str, Any]]:
        """The runs of a DAG, newest first."""
        return list(self._get(f"dags/{dag}/dagRuns", order_by="-run_after", limit=50)["dag_runs"])

    def run_state(self, dag: str, run: str) -> str:
        return str(self._get(f"dags/{dag}/dagRuns/{run}")["state"])

    def tasks(self, dag: str, run: str) -> list[dict[str, Any]]:
        """The task instances of a run, one for each map index."""
        return list(self._get(f"dags/{dag}/dagRuns/{run}/taskInstances", limit=500)["task_instances"])

    def xcom(self, dag: str, run: str, task: str, map_index: int = -1) -> Any:
        """The return value of a task."""
        path = f"dags/{dag}/dagRuns/{run}/taskInstances/{task}/xcomEntries/return_value"
        return self._get(path, map_index=map_index, deserialize=True)["value"]

    def task_log(self, dag: str, run: str, task: str, attempt: int = 1, map_index: int = -1) -> str:
        """One try's log, as the UI shows it, a line an event."""
        path = f"dags/{dag}/dagRuns/{run}/taskInstances/{task}/logs/{attempt}"
        content = self._get(path, map_index=map_index, full_content=True)["content"]
        return "\n".join(_line(item) for item in content)

    def mark_run(self, dag: str, run: str, state: str) -> None:
        """Marks a run, as the UI's "Mark state as …" does."""
        self._request("PATCH", f"dags/{dag}/dagRuns/{run}", {"state": state})

    def mark_task(self, dag: str, run: str, task: str, state: str) -> None:
        """Marks a task of a run, as the UI's "Mark state as …" does."""
        self._request("PATCH", f"dags/{dag}/dagRuns/{run}/taskInstances/{task}", {"new_state": state})

    def clear(self, dag: str, run: str, task: str, *, downstream: bool = True) -> None:
        """Clears a task, with what follows it or without, as the UI's "Clear task" does."""
        body = {"dry_run": False, "dag_run_id": run, "task_ids": [task], "include_downstream": downstream, "only_failed": False}
        self._request("POST", f"dags/{dag}/clearTaskInstances", body)

    def clear_failed(self, dag: str, run: str) -> None:
        """Clears what has failed of a run, as the UI's "Clear run" with "Clear only failed tasks" does."""
        self._request("POST", f"dags/{dag}/dagRuns/{run}/clear", {"dry_run": False, "only_failed": True})

    def wait(self, dag: str, run: str, timeout: float, progress: Callable[[list[dict[str, Any]]], None] | None = None) -> str:
        """Waits for the end of a run and returns its state; ``progress`` gets the task instances every second."""
        until = time.monotonic() + timeout
        while True:
            state = self.run_state(dag, run)
            if progress:
                progress(self.tasks(dag, run))
            if state in ENDED:
                return state
            if time.monotonic() > until:
                raise AirflowError(f"{dag} {run} is still {state} after {timeout:.0f} s; logs in {self.home / 'logs'}")
            time.sleep(1)

    # inside

    def _run(self, *arguments: str) -> None:
        result = subprocess.run([_airflow(), *arguments], env=self.env, cwd=self.home, capture_output=True, text=True, timeout=300)
        (self.home / "migrate.log").write_text(result.stdout + result.stderr)
        if result.returncode:
            raise AirflowError(f"airflow {' '.join(arguments)} ended with {result.returncode}: {result.stderr[-2000:]}")

    def _wait_healthy(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        unhealthy: Any = "no answer yet"
        while time.monotonic() < until:
            for name, child in self._children.items():
                if child.poll() is not None:
                    raise AirflowError(f"airflow {name} ended with {child.returncode}: {_tail(self.home / f'{name}.log')}")
            try:
                health = self._http.get(f"{self.url}/api/v2/monitor/health", timeout=5).json()
                unhealthy = [name for name, part in health.items() if part.get("status") != "healthy"]
                if not unhealthy:
                    self._login()
                    if self._get("dags", limit=100)["total_entries"] >= len(list(self.dags.glob("*.py"))):
                        return
                    unhealthy = "the DAGs are not parsed yet"
            except (requests.RequestException, ValueError) as error:
                unhealthy = error
            time.sleep(0.5)
        raise AirflowError(f"Airflow is not healthy after {timeout:.0f} s ({unhealthy}); logs in {self.home}")

    def _login(self) -> None:
        answer = self._http.post(f"{self.url}/auth/token", json={"username": USER, "password": self.password}, timeout=30)
        answer.raise_for_status()
        self._http.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"

    def _get(self, path: str, **query: Any) -> Any:
        return self._request("GET", path, None, query)

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None, query: dict[str, Any] | None = None, known: int | None = None
    ) -> Any:
        """One answer of the REST API. Every request of this class may be repeated, so each is, where Airflow is busy: on SQLite,
        whose one writer it waits for, it answers 500 after a while. ``known`` is a status that means "done before"."""
        trouble = ""
        for attempt in range(_ATTEMPTS):
            time.sleep(0.5 * attempt)
            self.keep_up()
            try:
                answer = self._http.request(method, f"{self.url}/api/v2/{path}", json=body, params=query, timeout=30)
                if answer.status_code == 401:
                    self._login()
                    continue
            except requests.RequestException as error:
                trouble = str(error)
                continue
            if answer.status_code >= 500:
                trouble = f"{answer.status_code}: {answer.text[:500]}"
            elif answer.ok:
                return answer.json() if answer.content else None
            elif answer.status_code == known:
                return None
            else:
                raise AirflowError(f"{method} {path} answered {answer.status_code}: {answer.text[:500]}")
        raise AirflowError(
            f"{method} {path}: no usable answer from {self.url} in {_ATTEMPTS} tries ({trouble}); logs in {self.home}"
        )


def end_marked(marker: str) -> None:
    """Ends every living process that carries our marker, by pid: SIGTERM, and SIGKILL two seconds later."""
    for signum in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        left = processes.processes_with_marker(processes.MARKER, marker)
        if not left:
            return
        processes.send(left, signum)
        until = time.monotonic() + 2
        while time.monotonic() < until and processes.processes_with_marker(processes.MARKER, marker):
            time.sleep(0.1)
    left = processes.processes_with_marker(processes.MARKER, marker)
    if left:
        raise AirflowError(f"processes {left} do not end; end them by pid")


def _airflow() -> str:
    return str(Path(sys.executable).with_name("airflow"))


def _line(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    text = str(item.get("event", ""))
    for detail in item.get("error_detail") or []:
        text += f"\n{detail.get('exc_type')}: {detail.get('exc_value')}"
    return text


def _tail(path: Path, size: int = 1500) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    return text[-size:].strip() or "no log"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
