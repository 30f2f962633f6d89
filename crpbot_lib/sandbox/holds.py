"""Points of a training run's way at which the local cloud holds it, so that something can be done to it just there.

A hold is of one run (the value of the tag ``crpbot:run``) or, with ``*``, of all. What reaches its point waits until the hold is
released, which may also answer the held call, and some after it, with an error.
"""

from __future__ import annotations

import threading
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Point = Literal["look", "launched", "boot", "pull", "step", "publish", "terminate", "power-off"]
"""In the order of a run's way:

* ``look``: DescribeInstances with the run's tag as a filter, before it is answered
* ``launched``: RunInstances, carried out and not yet answered
* ``boot``: the instance stays ``pending``
* ``pull``: its ``docker pull`` does not return
* ``step``: each step of its training takes so much longer as ``--step-seconds`` says
* ``publish``: S3's PutObject of a model under ``models/`` that is tagged with the run, before it is carried out
* ``terminate``: TerminateInstances of an instance of the run, before it is carried out
* ``power-off``: its ``shutdown -h now`` does not return; the deadline is not held
"""
EVERY_RUN = "*"


class Hold(BaseModel):
    """What is asked for; replaces a former hold of the same run and point."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str = Field(min_length=1)
    at: Point
    skip: int = Field(default=0, ge=0)
    """So many times the point is passed before anything is held there."""


class Release(BaseModel):
    """Lets go what is held, and answers the next ``times`` calls, the held ones first, with ``error`` (a code of EC2's or S3's)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str = Field(min_length=1)
    at: Point
    error: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9.]*$")
    times: int = Field(default=1, ge=1)


class _State:
    def __init__(self, skip: int) -> None:
        self.skip, self.reached, self.held = skip, 0, True
        self.error, self.errors_left = "", 0


class Holds:
    """The holds in force. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._states: dict[tuple[str, Point], _State] = {}
        self._closed = False

    def set(self, hold: Hold) -> None:
        with self._changed:
            self._states[hold.run, hold.at] = _State(hold.skip)

    def release(self, release: Release) -> None:
        """ValueError when nothing was held there."""
        with self._changed:
            state = self._states.get((release.run, release.at))
            if state is None:
                raise ValueError(f"there is no hold of {release.run} at {release.at}")
            state.held = False
            if release.error:
                state.error, state.errors_left = release.error, release.times
            self._changed.notify_all()

    def close(self) -> None:
        """Lets everything go, for good: the local cloud ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, run: str, at: Point) -> str:
        """Returns when nothing holds ``run`` there (any more): the error code to answer with, or an empty text."""
        with self._changed:
            state = self._reach(run, at)
            if state is None:
                return ""
            self._changed.wait_for(lambda: self._closed or not state.held)
            if not state.errors_left:
                return ""
            state.errors_left -= 1
            return state.error

    def holding(self, run: str, at: Point) -> bool:
        """Whether ``run`` is to wait there; for those who ask again and again."""
        with self._changed:
            state = self._reach(run, at)
            return state is not None and state.held and not self._closed

    def _reach(self, run: str, at: Point) -> _State | None:
        state = self._states.get((run, at)) or self._states.get((EVERY_RUN, at))
        if state is None:
            return None
        if state.skip:
            state.skip -= 1
            return None
        state.reached += 1
        return state

    def describe(self) -> list[dict[str, Any]]:
        """Each hold: its run and point, whether it holds still, and how often it was reached."""
        with self._changed:
            return [
                {"run": run, "at": at, "held": state.held, "reached": state.reached} for (run, at), state in self._states.items()
            ]
