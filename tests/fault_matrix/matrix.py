"""The fault matrix: real runs of ``retrain`` in a real Airflow, each struck at a point by a fault, and what became of its instance.

Runs go side by side, each held by the local cloud at its phase (``crpbot_lib/sandbox/holds.py``) until the fault has struck. Then
it is let go, and the matrix waits until it has ended and none of its instances is alive. Who ended an instance is what EC2 knows:
its own power-off or deadline, or the caller of TerminateInstances.

Clocks are shortened: heartbeats of tasks 20 s, of the job 30 s, reaper and dead-man's switch every 20 s, deadlines 120 s.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import requests

from crpbot_lib.lake import Lake
from crpbot_lib.sandbox import demo, processes
from crpbot_lib.sandbox.local_airflow import ENDED, REPOSITORY, AirflowError, LocalAirflow, end_marked
from tests.fault_matrix import cells
from tests.fault_matrix.cells import Cell

CONF = {"start": "2025-05-26", "end": "2025-05-27", "symbols": ["ETH-USD"]}
LIFETIME_MINUTES = 2
LOOK_SECONDS = 20
"""Of the reaper and of the dead-man's switch."""
SHUTDOWN_SECONDS = 1.5
LONGEST_LIFE = LIFETIME_MINUTES * 60 + 2 * LOOK_SECONDS + SHUTDOWN_SECONDS
"""Seconds from the launch by which any instance must have ended: the deadline, two looks (one may take long on a busy machine), and
EC2's own time."""
APPROACH_SECONDS, END_SECONDS = 900, 600
"""How long a run may take to its phase, and to its end after the fault, on a busy machine."""
ATTEMPTS = 3
"""Runs to bring to one cell's phase: on a busy machine a deadline may end an instance, or a lock of SQLite a task, before."""
HELD_AFTER_SECONDS = 8.0
"""Airflow hears of a mark or a clear at the task's next heartbeat, which comes every 5 s: until then the task is held."""
AWAY_SECONDS = 20.0
"""How long a killed component, or AWS, is away; the database for twice as long."""
CODE = ("crpbot_lib", "dags", "infra", "plugins", "tests/fault_matrix")
"""What a result depends on."""
SHORT_CLOCKS = {
    "CRPBOT_GPU__MAX_LIFETIME_MINUTES": str(LIFETIME_MINUTES),
    "CRPBOT_GPU__BOOT_TIMEOUT_MINUTES": "1.25",
    "CRPBOT_GPU__HEARTBEAT_TIMEOUT_MINUTES": "0.5",
    "CRPBOT_GPU__REAP_SECONDS": str(LOOK_SECONDS),
    "CRPBOT_GPU__REAP_GRACE_MINUTES": "0.25",
    # what the instances of more than a hundred launches could come to at worst
    "CRPBOT_GPU__MAX_MONTH_USD": "1000",
    "AIRFLOW__CORE__PARALLELISM": "16",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "5",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "15",
    # shorter, and a scheduler on a busy machine takes itself for dead and starts its own tasks anew
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "30",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "20",
}
SWITCH = """
import importlib.util, sys, time, traceback
spec = importlib.util.spec_from_file_location("dead_mans_switch", sys.argv[1])
switch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(switch)
while True:
    try:
        switch.handler({}, None)
    except Exception:
        traceback.print_exc()
    time.sleep(float(sys.argv[2]))
"""
Log = Callable[[str], None]


class MatrixError(Exception):
    """A cell could not be brought to its phase, or the deployment failed; the message says where its logs are."""


@dataclass
class Result:
    """What one cell came to. ``seconds`` from the fault until no instance of the run was alive, for good; 0 where none was."""

    cell: str
    run_state: str
    layers: list[str]
    """Who ended each of the run's instances, in the order of their launches."""
    seconds: float
    attempts: int
    """Tries of the task that was struck."""
    longest_life: float
    """Seconds that the longest living of its instances lived."""
    wrong: list[str] = field(default_factory=list)
    """What the promise forbids and was seen; empty where it held."""


@dataclass
class Struck:
    """A cell on its way: its run, when it was struck, and what must come to pass before it is let go."""

    cell: Cell
    dag: str
    dag_run: str
    began: float = field(default_factory=time.monotonic)
    run: str = ""
    gate: str = ""
    """Where it waits for the others on its way, if it does."""
    attempt: int = 1
    """The how many-th run this is that shall get to the cell's phase."""
    prepared: bool = False
    task_id: str = ""
    try_number: int = 0
    """Of the task that does the work of the phase."""
    at: datetime | None = None
    left_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    let_go_when: Callable[[], bool] | None = None
    let_go: float | None = None
    """On the monotonic clock."""
    hurried: bool = False
    """Whether its training has been let go too."""

    @property
    def key(self) -> str:
        return self.cell.key


class Deployment:
    """A local cloud, an Airflow on it with shortened clocks, and the dead-man's switch."""

    def __init__(self, state: Path, say: Log, todo: Sequence[Cell] = ()) -> None:
        self.state, self.say = state, say
        self.timeouts = [cell for cell in todo if cell.fault == cells.DAGRUN_TIMEOUT]
        self.marker = f"matrix-{uuid.uuid4().hex}"
        self._number, self._told = 0, 0
        self._airflow: LocalAirflow | None = None

    @contextmanager
    def started(self) -> Iterator[Deployment]:
        arguments = ("--step-seconds", "3", "--boot-seconds", "1", "--shutdown-seconds", str(SHUTDOWN_SECONDS))
        before = dict(os.environ)
        with demo.local_cloud(self.state / "cloud", self.marker, *arguments) as cloud:
            self.control = cloud["control_url"]
            self.env = {**demo.profile(cloud["env"]), **SHORT_CLOCKS}
            os.environ.update({name: value for name, value in self.env.items() if name.startswith(("AWS_", "CRPBOT_"))})
            switch = processes.spawn(
                [sys.executable, "-c", SWITCH, str(REPOSITORY / "infra" / "dead_mans_switch.py"), str(LOOK_SECONDS)],
                env={**os.environ, "PROJECT": "crpbot", "AWS_SDK_UA_APP_ID": "dead-mans-switch"},
                stdout=(self.state / "switch.log").open("ab"),
                stderr=subprocess.STDOUT,
                marker=self.marker,
            )
            try:
                self.lake = Lake(self.env["CRPBOT_LAKE"])
                self.start_airflow()
                yield self
            finally:
                os.environ.clear()
                os.environ.update(before)
                if self._airflow is not None:
                    self._airflow.stop()
                processes.end_group(switch.pid)
                switch.wait(timeout=30)
        end_marked(self.marker)

    @property
    def airflow(self) -> LocalAirflow:
        assert self._airflow is not None, "Airflow has been stopped"
        return self._airflow

    def stop_airflow(self) -> None:
        """SIGKILL to everything of Airflow, and nothing takes its place until ``start_airflow``."""
        airflow, self._airflow = self.airflow, None
        while pids := processes.processes_with_marker(processes.MARKER, airflow.marker):
            processes.send(pids, signal.SIGKILL)
            time.sleep(0.1)
        airflow.stop()

    def start_airflow(self) -> None:
        """A fresh Airflow, with its database, on the same cloud and lake; nothing where one is up."""
        if self._airflow is not None:
            return
        self._number += 1
        home = self.state / f"airflow-{self._number}"
        self.dags = home / "dags"
        self.dags.mkdir(parents=True)
        for file in (REPOSITORY / "dags").glob("*.py"):
            (self.dags / file.name).write_text(file.read_text())
        retrain = (REPOSITORY / "dags" / "retrain.py").read_text()
        (self.dags / "retrain.py").write_text(_changed(retrain, "max_active_runs=1", "max_active_runs=16"))
        for cell in self.timeouts:
            self.write_timeout(cell, 3600)
        airflow = LocalAirflow(home, self.env, marker=f"{self.marker}-airflow-{self._number}", dags=self.dags)
        airflow.start()
        self._airflow, self._told = airflow, 0
        for dag in ("retrain", *map(_dag, self.timeouts), "reap_gpu_instances"):
            airflow.unpause(dag)
        self.say(f"Airflow is up at {airflow.url}")

    def tell_what_died(self) -> None:
        """Which components of Airflow have ended by themselves and were started anew."""
        if self._airflow is not None:
            for one in self._airflow.died[self._told :]:
                self.say(f"started anew: {one}")
            self._told = len(self._airflow.died)

    def write_timeout(self, cell: Cell, seconds: int) -> None:
        """The cell's own DAG, with the ``dagrun_timeout`` that it must not have."""
        text = (REPOSITORY / "dags" / "retrain.py").read_text()
        text = _changed(text, "max_active_runs=1", f"max_active_runs=16,\n    dagrun_timeout=timedelta(seconds={seconds})")
        text = _changed(text, "@dag(\n", f'@dag(\n    dag_id="{_dag(cell)}",\n')
        (self.dags / f"{_dag(cell)}.py").write_text(text)

    def without_timeouts(self) -> None:
        """Takes the DAGs with a timeout away: every file costs the dag processor."""
        for cell in self.timeouts:
            (self.dags / f"{_dag(cell)}.py").unlink(missing_ok=True)
        self.timeouts = []

    # --- the local cloud ---

    def post(self, path: str, body: Any) -> Any:
        answer = requests.post(f"{self.control}/_sandbox/{path}", json=body, timeout=10)
        answer.raise_for_status()
        return answer.json()

    def instances(self, run: str) -> list[dict[str, Any]]:
        answer = requests.get(f"{self.control}/_sandbox/instances", timeout=10)
        answer.raise_for_status()
        return [i for i in answer.json() if i["tags"].get("crpbot:run") == run]

    def reached(self) -> dict[tuple[str, str], int]:
        """How often each (run, point) that is held was reached."""
        answer = requests.get(f"{self.control}/_sandbox/holds", timeout=10)
        answer.raise_for_status()
        return {(one["run"], one["at"]): one["reached"] for one in answer.json()}

    def release(self, struck: Struck, *, error: str | None = None, times: int = 1) -> None:
        """Lets a run go on from its phase, whose own calls may be refused."""
        refusal = {"error": error, "times": times} if error else {}
        struck.let_go = time.monotonic()
        self.post("holds/release", {"run": struck.run, "at": struck.cell.phase.at, **refusal})
        if caught(struck.cell):
            self.post("holds/release", {"run": struck.run, "at": "look"})


def _changed(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise MatrixError(f"dags/retrain.py has {old!r} {text.count(old)} times, expected once: change what the matrix replaces")
    return text.replace(old, new)


def _dag(cell: Cell) -> str:
    """The DAG that the cell's run is one of."""
    phase = re.sub("[^a-z]+", "_", cell.phase.name.lower())
    return f"retrain_timeout_{phase}" if cell.fault == cells.DAGRUN_TIMEOUT else "retrain"


def caught(cell: Cell) -> bool:
    """Whether ``train`` is caught on its first look at its instance: deferred, it has no worker to kill."""
    return cell.fault == cells.WORKER_KILLED and cell.phase in cells.DEFERRED


def held_at(cell: Cell) -> list[str]:
    """Where the cell's run is held on its way."""
    return [at for at in (cell.phase.keeps, cell.phase.at, "look" if caught(cell) else "") if at]


def run_apart(
    deployment: Deployment, todo: Sequence[Cell], at_once: int, following: Sequence[Cell], ahead: list[Struck], attempt: int = 1
) -> Iterator[Result]:
    """Cells that hit their own run alone: ``at_once`` side by side, each struck when it is at its phase. The runs of the
    ``following`` cells begin when all have been struck, and are put in ``ahead``. Who has left its way: as in ``run_together``.
    """
    waiting, open_, late = list(todo), list[Struck](), list[Struck]()
    while waiting or open_:
        deployment.tell_what_died()
        while waiting and len(open_) < at_once:
            open_.append(_start(deployment, waiting.pop(0), attempt=attempt))
        reached = deployment.reached()
        for struck in list(open_):
            if struck.at is None and _is_there(deployment, struck, reached):
                if not _is_still_there(deployment, struck):
                    open_.remove(struck)
                    late.append(_give_up(deployment, struck))
                    continue
                deployment.say(f"{struck.key}: now")
                struck.at = datetime.now(UTC)
                struck.let_go_when = _strike_one(deployment, struck)
            if struck.at is not None and (result := _end_of(deployment, struck)):
                open_.remove(struck)
                yield result
        if not ahead and not waiting and not late and all(struck.at for struck in open_):
            ahead += _start_all(deployment, following)
        _hold_in_time(deployment, ahead)
        time.sleep(1)
    if again := (yield from _to_begin_anew(deployment, late)):
        yield from run_apart(deployment, again, at_once, following, ahead, attempt + 1)


def run_batches(deployment: Deployment, batches: Sequence[Sequence[Cell]], ahead: list[Struck]) -> Iterator[Result]:
    """Batch after batch of cells whose fault hits every run at once; the runs of the first may be ``ahead``. While one ends, the
    runs of the next are on their way to their launches already, unless Airflow is stopped."""
    for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=()):
        deployment.start_airflow()
        open_, ahead = ahead or _start_all(deployment, batch), []
        go_ahead = () if batch[0].fault in cells.STOPPING else following
        yield from run_together(deployment, open_, go_ahead, ahead)


def _start(deployment: Deployment, cell: Cell, **of_struck: Any) -> Struck:
    return Struck(cell, _dag(cell), deployment.airflow.trigger(_dag(cell), conf=CONF), **of_struck)


def _start_all(deployment: Deployment, batch: Sequence[Cell], attempt: int = 1) -> list[Struck]:
    return [_start(deployment, cell, gate="look", attempt=attempt) for cell in batch]


def run_together(
    deployment: Deployment, open_: list[Struck], following: Sequence[Cell] = (), ahead: list[Struck] | None = None
) -> Iterator[Result]:
    """Cells of a fault that hits every run at once: each is brought to its phase, then it happens. The runs of the ``following``
    cells begin behind it and are put in ``ahead``.

    They wait for each other before their launches, so that no instance grows old while the last run is on its way. Who is no
    longer at its phase when the others are, or ended on its way, as happens on a busy machine, gets there in another run,
    afterwards, unless what became of this one is wrong.
    """
    _until_all(open_, lambda struck, reached: _is_held(deployment, struck, reached), deployment)
    for struck in open_:
        if struck.run and struck.cell.phase != cells.BEFORE_LAUNCH:
            deployment.post("holds/release", {"run": struck.run, "at": struck.gate})
    _until_all(open_, lambda struck, reached: _is_there(deployment, struck, reached), deployment)
    late = [struck for struck in open_ if not _is_still_there(deployment, struck)]
    for struck in late:
        open_.remove(_give_up(deployment, struck))
    if open_:
        deployment.say(f"{' and '.join(sorted({struck.cell.fault.name for struck in open_}))}: now, for {len(open_)} runs")
        for struck in open_:
            struck.at = datetime.now(UTC)
        _strike_all(deployment, open_)
    ahead = [] if ahead is None else ahead
    ahead += _start_all(deployment, following)
    while open_:
        deployment.tell_what_died()
        _hold_in_time(deployment, ahead)
        for struck in list(open_):
            if result := _end_of(deployment, struck):
                open_.remove(struck)
                yield result
        time.sleep(1)
    if again := (yield from _to_begin_anew(deployment, late)):
        _until_all(ahead, lambda struck, reached: _is_held(deployment, struck, reached), deployment)
        deployment.start_airflow()
        yield from run_together(deployment, _start_all(deployment, again, late[0].attempt + 1))


def _give_up(deployment: Deployment, struck: Struck) -> Struck:
    """Ends a run that is not at its phase any more. MatrixError when that was the last attempt."""
    if struck.attempt == ATTEMPTS:
        raise MatrixError(f"{struck.key}: not to be brought to its phase in {ATTEMPTS} runs; logs in {deployment.airflow.home}")
    deployment.say(f"{struck.key}: it has left its phase, and is begun anew after the others")
    struck.left_at = datetime.now(UTC)
    if not _has_ended(deployment, struck)():
        deployment.airflow.mark_run(struck.dag, struck.dag_run, "failed")
    if struck.run:
        for at in {*held_at(struck.cell), struck.gate} - {""}:
            deployment.post("holds/release", {"run": struck.run, "at": at})
    return struck


def _to_begin_anew(deployment: Deployment, late: Sequence[Struck]) -> Generator[Result, None, list[Cell]]:
    """Waits for the end of the instances of runs that were given up. Returns their cells but those of which something is wrong."""
    again = []
    for struck in late:
        while any(i["state"] != "terminated" for i in deployment.instances(struck.run)):
            if datetime.now(UTC) - struck.left_at > timedelta(seconds=END_SECONDS):
                break
            time.sleep(1)
        found = deployment.instances(struck.run)
        if wrong := _forbidden(found):
            layers, life = [_layer(instance["ended_by"]) for instance in found], max(map(_life, found), default=0.0)
            yield Result(struck.key, "left its phase", layers, 0.0, struck.try_number, round(life, 1), wrong)
        else:
            again.append(struck.cell)
    return again


def _hold_in_time(deployment: Deployment, ahead: Sequence[Struck]) -> None:
    """A run's holds must be there before its launch is."""
    for struck in ahead:
        if not struck.run:
            _is_there(deployment, struck, {})


def _until_all(all_: Sequence[Struck], there: Callable[[Struck, dict[tuple[str, str], int]], bool], deployment: Deployment) -> None:
    away = list(all_)
    while away:
        deployment.tell_what_died()
        reached = deployment.reached()
        away = [struck for struck in away if not there(struck, reached)]
        time.sleep(1)


def _is_held(deployment: Deployment, struck: Struck, reached: dict[tuple[str, str], int]) -> bool:
    """Whether the run waits at its gate."""
    if not struck.run:
        return _is_there(deployment, struck, reached)
    return _has_ended_on_its_way(deployment, struck) or reached[struck.run, struck.gate] > 0


def _has_ended_on_its_way(deployment: Deployment, struck: Struck) -> bool:
    """Whether the run has ended before anything was done to it. MatrixError when it takes too long."""
    if time.monotonic() - struck.began > APPROACH_SECONDS:
        raise MatrixError(f"{struck.key}: not there after {APPROACH_SECONDS} s; logs in {deployment.airflow.home}")
    return _has_ended(deployment, struck)()


def _is_still_there(deployment: Deployment, struck: Struck) -> bool:
    """Whether the run is where it was when it had got there: the same try of the task, and one instance, alive, or none yet."""
    task, found = _states(deployment, struck)[struck.cell.phase.task], deployment.instances(struck.run)
    same = (task["id"], int(task["try_number"])) == (struck.task_id, struck.try_number) and _at_work(struck.cell, task["state"])
    return same and len(found) == len(_alive(deployment, struck.run)) == (struck.cell.phase != cells.BEFORE_LAUNCH)


def _at_work(cell: Cell, state: str | None) -> bool:
    """Whether a task in this state does the work of the cell's phase."""
    return state == ("deferred" if cell.phase in cells.DEFERRED and not caught(cell) else "running")


def _is_there(deployment: Deployment, struck: Struck, reached: dict[tuple[str, str], int]) -> bool:
    """Whether the run is held at its phase, or ended on its way to it. MatrixError when it takes too long."""
    airflow, cell = deployment.airflow, struck.cell
    if _has_ended_on_its_way(deployment, struck):
        return True
    if not struck.run:
        with suppress(AirflowError):  # until `plan` is done
            struck.run = airflow.xcom(struck.dag, struck.dag_run, "plan")["run"]
            for at in held_at(cell):
                # the launch's own look goes through
                skip = 1 if at == "look" and cell.phase != cells.BEFORE_LAUNCH else 0
                deployment.post("holds", {"run": struck.run, "at": at, "skip": skip})
            if struck.gate and struck.gate not in held_at(cell):
                deployment.post("holds", {"run": struck.run, "at": struck.gate})
        return False
    if cell.phase == cells.TEARDOWN and not struck.prepared:
        if reached[struck.run, "step"] and _states(deployment, struck)["train"]["state"] == "deferred":
            airflow.mark_task(struck.dag, struck.dag_run, "train", "failed")
            struck.prepared = True
        return False
    if not all(reached[struck.run, at] for at in held_at(cell)):
        return False
    task = _states(deployment, struck)[cell.phase.task]
    struck.task_id, struck.try_number = task["id"], int(task["try_number"])
    return _at_work(cell, task["state"])


def _states(deployment: Deployment, struck: Struck) -> dict[str, dict[str, Any]]:
    return {t["task_id"]: t for t in deployment.airflow.tasks(struck.dag, struck.dag_run)}


# --- what happens ---


def _strike_all(deployment: Deployment, struck: Sequence[Struck]) -> None:
    """What hits every run at once."""
    faults = {one.cell.fault for one in struck}
    {
        cells.AWS_ERRORS: _aws_errors,
        cells.SCHEDULER_KILLED: _kill("scheduler"),
        cells.TRIGGERER_KILLED: _kill("triggerer"),
        cells.DATABASE_DOWN: _lock_database,
        cells.AIRFLOW_STOPPED: _stop_airflow,
        cells.AIRFLOW_STOPPED_AND_HANGS: _stop_airflow,
    }[faults.pop()](deployment, struck)


def _strike_one(deployment: Deployment, struck: Struck) -> Callable[[], bool] | None:
    """One run's own fault; the condition on which it is let go, where that is not at once."""
    airflow, cell = deployment.airflow, struck.cell
    after = time.monotonic() + HELD_AFTER_SECONDS
    if cell.fault == cells.TASK_FAILS:
        return _fail_task(deployment, struck)
    if cell.fault == cells.DAGRUN_TIMEOUT:
        deployment.write_timeout(cell, 1)
        return _has_ended(deployment, struck)
    if cell.fault == cells.WORKER_KILLED:
        _kill_worker(deployment, struck)
        deployment.release(struck)
        return None
    if cell.fault == cells.INTERRUPTED:
        for instance in _alive(deployment, struck.run):
            deployment.post(f"instances/{instance['id']}/interrupt", {"notice_seconds": 5})
        deployment.release(struck)
        return None
    if cell.fault == cells.INSTANCE_HANGS:
        _freeze(deployment, struck)
        deployment.release(struck)
        return None
    {
        cells.RUN_FAILED: lambda: airflow.mark_run(struck.dag, struck.dag_run, "failed"),
        cells.TASK_SUCCESS: lambda: airflow.mark_task(struck.dag, struck.dag_run, cell.phase.task, "success"),
        cells.TASK_CLEARED: lambda: airflow.clear(struck.dag, struck.dag_run, cell.phase.task),
    }[cell.fault]()
    return lambda: time.monotonic() > after


def _fail_task(deployment: Deployment, struck: Struck) -> Callable[[], bool] | None:
    """Fails the phase's task, each by what fails there: a refusal of AWS, a boot or a pull that does not end, a job that dies."""
    phase = struck.cell.phase
    if phase in (cells.BOOT, cells.PULL):
        return lambda: _states(deployment, struck)[phase.task]["state"] != "deferred"
    if phase == cells.TRAINING:
        (instance,) = _alive(deployment, struck.run)
        jobs = [pid for pid in instance["pids"] if "crpbot_lib.sandbox.paced" in _command(pid)]
        if len(jobs) != 1:
            raise MatrixError(f"{struck.key}: the instance has the jobs {jobs}, expected one")
        processes.send(jobs, signal.SIGKILL)
        deployment.release(struck)
        return None
    error, times = {
        cells.BEFORE_LAUNCH: ("UnauthorizedOperation", 1),
        # as often as the launch asks with one token
        cells.IN_RUN_INSTANCES: ("InternalError", 5),
        cells.SYNC: ("AccessDenied", 1),
        cells.TEARDOWN: ("UnauthorizedOperation", 1000),
    }[phase]
    deployment.release(struck, error=error, times=times)
    return None


def _kill_worker(deployment: Deployment, struck: Struck) -> None:
    """SIGKILL to the process of the task and to the executor's worker that supervises it."""
    marked = processes.processes_with_marker(processes.MARKER, deployment.airflow.marker)
    pids = [pid for pid in marked if struck.task_id in _command(pid)]
    if len(pids) != 2 or set(pids) & set(deployment.airflow.component_pids()):
        found = "; ".join(f"{pid} {_command(pid)}" for pid in pids) or "none"
        raise MatrixError(f"{struck.key}: expected a worker and its task process, found {found}")
    processes.send(pids, signal.SIGKILL)


def _aws_errors(deployment: Deployment, started: Sequence[Struck]) -> None:
    """Every call of EC2 is throttled for a while, then fails for a while."""
    for error in ("RequestLimitExceeded", "InternalError"):
        deployment.post("ec2/faults", [{"error": error}])
        for struck in started:
            deployment.release(struck)
        time.sleep(AWAY_SECONDS / 2)
    deployment.post("ec2/faults", [])


def _kill(component: str) -> Callable[[Deployment, Sequence[Struck]], None]:
    """SIGKILL to one component; another one takes its place after a while."""

    def kill(deployment: Deployment, started: Sequence[Struck]) -> None:
        deployment.airflow.kill_component(component)
        for struck in started:
            deployment.release(struck)
        time.sleep(AWAY_SECONDS)
        deployment.airflow.start_component(component)

    return kill


def _lock_database(deployment: Deployment, started: Sequence[Struck]) -> None:
    """Nobody can write to the metadata database, for longer than anybody waits for it."""
    database = sqlite3.connect(deployment.airflow.home / "airflow.db", timeout=60, isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    try:
        for struck in started:
            deployment.release(struck)
        time.sleep(2 * AWAY_SECONDS)
    finally:
        database.execute("ROLLBACK")
        database.close()


def _stop_airflow(deployment: Deployment, started: Sequence[Struck]) -> None:
    """Nothing of Airflow is left; some of the instances hang besides."""
    for struck in started:
        if struck.cell.fault == cells.AIRFLOW_STOPPED_AND_HANGS:
            _freeze(deployment, struck)
    deployment.stop_airflow()
    for struck in started:
        # a pull that hangs goes on to hang; all else goes its way
        if struck.cell.phase != cells.PULL:
            deployment.release(struck)


def _freeze(deployment: Deployment, struck: Struck) -> None:
    for instance in _alive(deployment, struck.run):
        deployment.post(f"instances/{instance['id']}/freeze", {})


def _has_ended(deployment: Deployment, struck: Struck) -> Callable[[], bool]:
    return lambda: deployment.airflow.run_state(struck.dag, struck.dag_run) in ENDED


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


# --- the end ---


def _alive(deployment: Deployment, run: str) -> list[dict[str, Any]]:
    return [i for i in deployment.instances(run) if i["state"] in ("pending", "running", "stopping", "stopped")]


def _end_of(deployment: Deployment, struck: Struck) -> Result | None:
    """What the cell came to, once nothing of the run is alive or can come to be; at the latest after ``END_SECONDS``."""
    assert struck.at is not None
    stopped = struck.cell.fault in cells.STOPPING
    try:
        if struck.let_go_when and struck.let_go_when():
            deployment.release(struck)
            struck.let_go_when = None
        _hurry(deployment, struck)
        gone = all(i["state"] == "terminated" and not i["pids"] for i in deployment.instances(struck.run))
        over = gone and not struck.let_go_when and _is_quiet(deployment, struck)
        over = over and (stopped or _has_ended(deployment, struck)())
    except AirflowError as error:
        deployment.say(f"{struck.key}: {error}")
        over = False
    if not over and datetime.now(UTC) - struck.at < timedelta(seconds=END_SECONDS):
        return None
    result = _result(deployment, struck)
    ended = ", ".join(result.layers) or "nobody"
    deployment.say(f"{result.cell}: {result.run_state}, ended by {ended}, {result.seconds:.0f} s {'; '.join(result.wrong)}")
    return result


def _hurry(deployment: Deployment, struck: Struck) -> None:
    """Once the run trains on as if nothing had happened to its launch, its training need take no longer than it takes."""
    phase, fault = struck.cell
    # what cannot be torn down ends by itself
    waits_for = {(cells.IN_RUN_INSTANCES, fault): "deferred", (cells.TEARDOWN, cells.TASK_FAILS): "failed"}.get((phase, fault))
    if fault not in cells.GOES_ON or not waits_for or struck.hurried or struck.let_go is None:
        return
    if _states(deployment, struck)["train"]["state"] == waits_for:
        deployment.post("holds/release", {"run": struck.run, "at": struck.cell.phase.keeps})
        struck.hurried = True


def _is_quiet(deployment: Deployment, struck: Struck) -> bool:
    """Whether nobody works for the run any more who was let go: Airflow ends a process of an ended run at its next heartbeat, and
    until then it may launch."""
    if struck.let_go is not None and time.monotonic() - struck.let_go < HELD_AFTER_SECONDS:
        return False
    if struck.cell.fault in cells.STOPPING:
        return True
    marked = processes.processes_with_marker(processes.MARKER, deployment.airflow.marker)
    return not any(struck.task_id in _command(pid) for pid in marked)


def _result(deployment: Deployment, struck: Struck) -> Result:
    assert struck.at is not None
    stopped = struck.cell.fault in cells.STOPPING
    found = deployment.instances(struck.run)
    tasks = {} if stopped else _states(deployment, struck)
    state = "no Airflow" if stopped else deployment.airflow.run_state(struck.dag, struck.dag_run)
    wrong = _forbidden(found)
    spans = [_alive_span(instance) for instance in found]
    if not _is_quiet(deployment, struck):
        wrong.append("a process still works for the run")
    if state not in (*ENDED, "no Airflow"):
        wrong.append(f"the run is still {state}")
    # who marks the sync as done takes its place
    done_by_hand = struck.cell == Cell(cells.SYNC, cells.TASK_SUCCESS)
    if state == "success" and not done_by_hand and not _published(deployment, struck.run):
        wrong.append("the run is green and has published nothing")
    layers = [_layer(instance["ended_by"]) for instance in found]
    if (expected := cells.last_layers(struck.cell)) and layers and layers[-1] not in expected:
        wrong.append(f"layer {layers[-1]} ended it, expected {' or '.join(sorted(expected))}")
    terminate = tasks.get("terminate", {})
    # who marks the teardown as done takes its place
    torn_down = terminate.get("state") == "success" and struck.cell != Cell(cells.TEARDOWN, cells.TASK_SUCCESS)
    if torn_down and spans:
        late = (max(end for _, end in spans) - datetime.fromisoformat(terminate["end_date"])).total_seconds()
        if late > 1:
            wrong.append(f"an instance was alive {late:.0f} s after the teardown had succeeded")
    ends = [datetime.fromisoformat(i["history"][-1]["at"]) for i in found]
    seconds = max([0.0, *((end - struck.at).total_seconds() for end in ends)])
    attempts = int(tasks[struck.cell.phase.task]["try_number"]) if tasks else 1
    life = max(map(_life, found), default=0.0)
    return Result(struck.key, state, layers, round(seconds, 1), attempts, round(life, 1), wrong)


def _forbidden(found: Sequence[dict[str, Any]]) -> list[str]:
    """What no fault excuses among the instances of a run."""
    wrong = []
    if living := [f"{i['id']} is {i['state']}" for i in found if i["state"] != "terminated" or i["pids"]]:
        wrong.append(f"alive: {', '.join(living)}")
    spans = sorted(_alive_span(instance) for instance in found)
    if any(following[0] < former[1] for former, following in itertools.pairwise(spans)):
        wrong.append("two instances were alive at once")
    if (life := max(map(_life, found), default=0.0)) > LONGEST_LIFE:
        wrong.append(f"an instance lived {life:.0f} s, its last layer should have ended it after {LONGEST_LIFE:.0f} s")
    return wrong


def _alive_span(instance: dict[str, Any]) -> tuple[datetime, datetime]:
    """From the launch until EC2 began to end it, or until now."""
    at = [datetime.fromisoformat(one["at"]) for one in instance["history"] if one["state"] in ("shutting-down", "terminated")]
    return datetime.fromisoformat(instance["history"][0]["at"]), min(at, default=datetime.now(UTC))


def _life(instance: dict[str, Any]) -> float:
    first, last = (datetime.fromisoformat(instance["history"][at]["at"]) for at in (0, -1))
    return (last - first) / timedelta(seconds=1)


def _layer(ended_by: str) -> str:
    """The layer of docs/termination.md, by what EC2 knows of the end."""
    callers = {
        "TerminateRunInstances": "1",
        # `verdict`, which looks once more
        "_PythonDecoratedOperator": "1",
        "ReapInstances": "4",
        "TrainOnInstance": "retry",
        "LaunchTrainingInstance": "retry",
    }
    if match := re.search(r"Caller/(\w+)", ended_by):
        return callers.get(match.group(1), match.group(1))
    own = {"power-off": "2", "deadline": "3", "spot": "spot"}
    return own.get(ended_by) or ("5" if "app/dead-mans-switch" in ended_by else ended_by)


def _published(deployment: Deployment, run: str) -> bool:
    manifests = [key for key in deployment.lake.keys("models/") if key.endswith("/manifest.json")]
    return any(deployment.lake.read_json(key)["run"] == run for key in manifests)


# --- all of it ---


def _code() -> str:
    """A hash of all that a result depends on."""
    files = sorted(file for part in CODE for file in (REPOSITORY / part).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(REPOSITORY)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def run_matrix(state: Path, chosen: Sequence[Cell], say: Log, *, at_once: int = 7) -> list[Result]:
    """Runs the ``chosen`` cells, those that ``state`` has a good result of for the same code left out, and returns the results of
    all.

    Each result is kept in ``results.json`` at once, so that an interrupted matrix goes on where it was. MatrixError when a cell
    does not get to its phase, or a run without any fault is not green: then nothing else says anything.
    """
    state.mkdir(parents=True, exist_ok=True)
    file, code = state / "results.json", _code()
    before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    same = before.get("code") == code
    kept: dict[str, dict[str, Any]] = {k: r for k, r in before["results"].items() if not r["wrong"]} if same else {}
    if before and not same:
        say("the code has changed since the kept results: every cell is run")
    todo = [cell for cell in chosen if cell.key not in kept]

    def keep(results: Iterator[Result]) -> None:
        for result in results:
            kept[result.cell] = asdict(result)
            part = file.with_suffix(".part")
            part.write_text(json.dumps({"code": code, "results": kept}, indent=1))
            part.replace(file)

    if todo:
        with Deployment(state / uuid.uuid4().hex[:8], say, todo).started() as deployment:
            unharmed = deployment.airflow.trigger("retrain", conf=CONF)
            batches, ahead = cells.together(todo, at_once), list[Struck]()
            apart = [cell for cell in todo if not cell.fault.shared]
            keep(run_apart(deployment, apart, at_once, batches[0] if batches else (), ahead))
            if deployment.airflow.wait("retrain", unharmed, timeout=END_SECONDS) != "success":
                raise MatrixError(f"a run without any fault failed; logs in {deployment.airflow.home}")
            deployment.without_timeouts()
            keep(run_batches(deployment, batches, ahead))
    return [Result(**kept[cell.key]) for cell in chosen]
