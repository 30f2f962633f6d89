"""What the fault matrix holds: where a run can be when something happens to it, what can happen, and which pairs there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Phase:
    """Where a run is. ``task`` does its work then, and the local cloud holds the run at the point ``at``."""

    name: str
    task: str
    at: str
    keeps: str = ""
    """Another point, at which it holds the run for good, so that there is an instance to be ended."""


BEFORE_LAUNCH = Phase("before launch", "launch", "look")
IN_RUN_INSTANCES = Phase("inside RunInstances", "launch", "launched", keeps="step")
BOOT = Phase("boot", "train", "boot")
PULL = Phase("image pull", "train", "pull")
TRAINING = Phase("training", "train", "step")
SYNC = Phase("sync", "sync_models", "publish", keeps="power-off")
# `train` is marked as failed in the middle of the training
TEARDOWN = Phase("teardown", "terminate", "terminate", keeps="step")
PHASES = (BEFORE_LAUNCH, IN_RUN_INSTANCES, BOOT, PULL, TRAINING, SYNC, TEARDOWN)
DEFERRED = (BOOT, PULL, TRAINING)
"""Nobody but the triggerer works for the run then."""


@dataclass(frozen=True)
class Fault:
    """What happens. ``shared``: to every run at once, so all of its cells meet it in the same moment."""

    name: str
    shared: bool = False


TASK_FAILS = Fault("task fails")
WORKER_KILLED = Fault("worker SIGKILL")
SCHEDULER_KILLED = Fault("scheduler SIGKILL", shared=True)
TRIGGERER_KILLED = Fault("triggerer SIGKILL", shared=True)
RUN_FAILED = Fault("run marked failed")
TASK_SUCCESS = Fault("task marked success")
TASK_CLEARED = Fault("task cleared")
DAGRUN_TIMEOUT = Fault("dagrun timeout")
AWS_ERRORS = Fault("AWS errors, throttling", shared=True)
INTERRUPTED = Fault("spot interruption")
DATABASE_DOWN = Fault("metadata database down", shared=True)
INSTANCE_HANGS = Fault("instance hangs")
AIRFLOW_STOPPED = Fault("Airflow stopped", shared=True)
AIRFLOW_STOPPED_AND_HANGS = Fault("Airflow stopped, instance hangs", shared=True)
GOES_ON = (
    TASK_FAILS,
    WORKER_KILLED,
    TASK_SUCCESS,
    TASK_CLEARED,
    AWS_ERRORS,
    SCHEDULER_KILLED,
    TRIGGERER_KILLED,
    DATABASE_DOWN,
)
"""After which a run whose launch was struck trains on, and ends by itself."""
STOPPING = (AIRFLOW_STOPPED, AIRFLOW_STOPPED_AND_HANGS)
"""With no Airflow left to go on with the run."""
FAULTS = (
    TASK_FAILS,
    WORKER_KILLED,
    RUN_FAILED,
    TASK_SUCCESS,
    TASK_CLEARED,
    INTERRUPTED,
    INSTANCE_HANGS,
    DAGRUN_TIMEOUT,
    AWS_ERRORS,
    SCHEDULER_KILLED,
    TRIGGERER_KILLED,
    DATABASE_DOWN,
    *STOPPING,
)


class Cell(NamedTuple):
    """One pair."""

    phase: Phase
    fault: Fault

    @property
    def key(self) -> str:
        return f"{self.phase.name} / {self.fault.name}"


CANNOT_RUN = {
    Cell(BEFORE_LAUNCH, INTERRUPTED).key: "there is no instance to interrupt",
    Cell(BEFORE_LAUNCH, INSTANCE_HANGS).key: "there is no instance to hang",
    Cell(BEFORE_LAUNCH, AIRFLOW_STOPPED_AND_HANGS).key: "there is no instance to hang",
}
CELLS = tuple(Cell(phase, fault) for fault in FAULTS for phase in PHASES if Cell(phase, fault).key not in CANNOT_RUN)

SHORT = tuple(
    Cell(*pair)
    for pair in (
        (BEFORE_LAUNCH, TASK_CLEARED),
        (IN_RUN_INSTANCES, WORKER_KILLED),
        (BOOT, INTERRUPTED),
        (PULL, RUN_FAILED),
        (TRAINING, INSTANCE_HANGS),
        (SYNC, TASK_SUCCESS),
        (TEARDOWN, TASK_FAILS),
        (SYNC, DAGRUN_TIMEOUT),
        (IN_RUN_INSTANCES, SCHEDULER_KILLED),
        (TRAINING, SCHEDULER_KILLED),
        (TEARDOWN, SCHEDULER_KILLED),
        (TRAINING, AIRFLOW_STOPPED),
        (PULL, AIRFLOW_STOPPED),
        (TRAINING, AIRFLOW_STOPPED_AND_HANGS),
    )
)
"""Every phase, every layer, and the kills of what all runs share; for CI."""


def last_layers(cell: Cell) -> frozenset[str] | None:
    """By which layers the cell's last instance must end; None: by any, before the teardown is done.

    Deadline and dead-man's switch are seconds apart at its end, so which of the two is first is chance.
    """
    phase, fault = cell
    if fault == DAGRUN_TIMEOUT and phase == SYNC:
        # Airflow skips the teardown, and the instance's own end is held
        return frozenset({"4"})
    if fault not in STOPPING:
        return None
    if phase == TEARDOWN:
        # asked for before Airflow stopped
        return frozenset({"1"})
    if fault == AIRFLOW_STOPPED_AND_HANGS:
        return frozenset({"5"})
    return frozenset({"3", "5"} if phase in (PULL, SYNC) else {"2", "3", "5"} if phase == IN_RUN_INSTANCES else {"2"})


def together(todo: Sequence[Cell], at_once: int) -> list[list[Cell]]:
    """The cells of shared faults, at most ``at_once`` side by side: of one fault, and last those that stop Airflow."""
    groups = [[cell for cell in todo if cell.fault == fault] for fault in FAULTS if fault.shared and fault not in STOPPING]
    groups.append([cell for cell in todo if cell.fault in STOPPING])
    return [group[first : first + at_once] for group in groups for first in range(0, len(group), at_once)]
