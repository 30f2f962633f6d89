"""The instance runner: each launched instance runs its user data as real processes and lives through EC2's states in real time.

One thread an instance: it waits for the boot, starts the process tree (``guest``), waits for a power-off, a termination or EC2's
taking it back, ends every process, and only then says ``terminated``. Being the thread that forked the tree, its death (with this
process) ends it.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crpbot_lib.sandbox import guest
from crpbot_lib.sandbox.holds import Holds
from crpbot_lib.sandbox.processes import descendants, freeze, send, spawn

State = Literal["pending", "running", "shutting-down", "terminated", "stopping", "stopped"]
STATE_CODES: dict[State, int] = {
    "pending": 0,
    "running": 16,
    "shutting-down": 32,
    "terminated": 48,
    "stopping": 64,
    "stopped": 80,
}
Initiator = Literal["user", "instance", "spot", "local cloud"]
ALIVE: tuple[State, ...] = ("pending", "running")

SPOT_TERMINATION = "Server.SpotInstanceTermination"
_HELD_SECONDS = 0.2
TERM_GRACE_SECONDS = 2.0
"""What the processes of an ending instance get between SIGTERM and SIGKILL."""
TRAINING_ENTRY_POINT = (sys.executable, "-m", "crpbot_lib.training")


@dataclass(frozen=True)
class Timing:
    """How long things take, in seconds. ``minute`` is the length of a minute in ``shutdown -h +N``."""

    boot: float = 2.0
    shutdown: float = 1.5
    minute: float = 60.0


@dataclass(frozen=True)
class Launch:
    """What RunInstances asked for. ``spot_price`` in USD an hour, None for on-demand."""

    id: str
    type: str
    image_id: str
    user_data: bytes
    shutdown_behavior: str
    lifecycle: Literal["spot", "on-demand"]
    zone: str
    spot_price: float | None
    run: str = ""
    """The training run that it is tagged with."""


class Interruption(BaseModel):
    """EC2 takes a spot instance back: the notice at once, the end ``notice_seconds`` later. None: the recommendation alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    notice_seconds: float | None = Field(default=120, ge=0, allow_inf_nan=False)
    """EC2 gives two minutes (EC2 user guide, "Spot Instance interruption notices")."""
    rebalance: bool = False
    """Whether the instance is also told that it is at risk, as a rebalance recommendation."""

    @model_validator(mode="after")
    def _something(self) -> Interruption:
        if self.notice_seconds is None and not self.rebalance:
            raise ValueError("neither a notice nor a rebalance recommendation: give notice_seconds, or rebalance, or both")
        return self


@dataclass
class _End:
    """Why and when an instance began to end."""

    initiator: Initiator
    by: str
    """What exactly: the caller's User-Agent; ``power-off`` or ``deadline`` of the instance itself; else the initiator."""
    at: datetime
    final: State
    began: float = field(default_factory=time.monotonic)


class Instance:
    """One instance. ``changed`` is called, from any thread and with no lock held, after every change of state."""

    def __init__(
        self, launch: Launch, machine: guest.Machine, timing: Timing, changed: Callable[[Instance], None], holds: Holds
    ) -> None:
        self.launch = launch
        self.state: State = "pending"
        self.history: list[tuple[State, datetime]] = [("pending", datetime.now(UTC))]
        self.end: _End | None = None
        self.launched = time.monotonic()
        self.ends_at: datetime | None = None
        """When EC2 takes the instance back, once it has said so; ``rebalance_at``: when it recommended to move."""
        self.rebalance_at: datetime | None = None
        self.frozen = False
        self.power_off_fails = False
        self._machine, self._timing, self._changed, self._holds = machine, timing, changed, holds
        self._power_off_at: float | None = None
        self._taken_back_at: float | None = None
        self._condition = threading.Condition()
        self._root: int | None = None
        self._thread = threading.Thread(target=self._live, name=launch.id, daemon=True)

    # --- asked from outside ---

    def start(self) -> None:
        self._thread.start()

    def terminate(self, initiator: Initiator = "user", by: str = "") -> None:
        """Ends the instance for good, from any state. Returns at once; the states follow. ``by``: the caller's User-Agent."""
        self._begin_end(initiator, "terminated", by)

    def stop(self, initiator: Initiator = "user", by: str = "") -> None:
        """StopInstances: like ``terminate``, but the instance stays, ``stopped``."""
        self._begin_end(initiator, "stopped", by)

    def power_off(self, by: str = "power-off") -> None:
        """The instance switched itself off; its InstanceInitiatedShutdownBehavior says what that means. A frozen one cannot."""
        if not self.power_off_fails:
            self._begin_end("instance", "terminated" if self.launch.shutdown_behavior == "terminate" else "stopped", by)

    def schedule_power_off(self, minutes: int) -> datetime:
        """``shutdown -h +minutes``: replaces what was scheduled before. Returns when it will be."""
        seconds = minutes * self._timing.minute
        with self._condition:
            self._power_off_at = time.monotonic() + seconds
            self._condition.notify_all()
        return datetime.now(UTC) + timedelta(seconds=seconds)

    def cancel_power_off(self) -> None:
        with self._condition:
            self._power_off_at = None
            self._condition.notify_all()

    def interrupt(self, interruption: Interruption) -> None:
        """EC2 announces that it takes the instance back; a later call replaces the time. ValueError unless it is spot and alive."""
        with self._condition:
            self._require_alive("interrupted")
            if self.launch.lifecycle != "spot":
                raise ValueError(f"{self.launch.id} is {self.launch.lifecycle}: only spot instances can be interrupted")
            now = datetime.now(UTC)
            if interruption.rebalance:
                self.rebalance_at = now
            if interruption.notice_seconds is not None:
                self.ends_at = now + timedelta(seconds=interruption.notice_seconds)
                self._taken_back_at = time.monotonic() + interruption.notice_seconds
            self._condition.notify_all()

    def freeze(self, *, processes: bool = True) -> None:
        """The instance hangs: its processes stop where they are and its power-off never comes. Only EC2 can end it then.

        A pending one becomes ``running`` and starts nothing. Without ``processes`` all goes on, but for the power-off. ValueError
        when the instance is ending.
        """
        with self._condition:
            self._require_alive("frozen")
            self.power_off_fails = True
            self.frozen = self.frozen or processes
            self._condition.notify_all()
        if self.frozen:
            self._freeze_processes()

    def _require_alive(self, what: str) -> None:
        if self.state not in ALIVE:
            raise ValueError(f"{self.launch.id} is {self.state}: only a pending or running instance can be {what}")

    def pids(self) -> list[int]:
        """Every living process of the instance, its root first."""
        root = self._root
        return [] if root is None else [root, *descendants(root)]

    @property
    def reason(self) -> str:
        """StateTransitionReason; EC2 dates it, but where it took the instance back itself."""
        if self.end is None:
            return ""
        if self.end.initiator == "spot":
            return SPOT_TERMINATION
        who = "User" if self.end.initiator != "instance" else "Instance"
        return f"{who} initiated ({self.end.at:%Y-%m-%d %H:%M:%S} GMT)"

    @property
    def state_reason(self) -> tuple[str, str]:
        """StateReason's code and message (EC2 API reference)."""
        if self.end is None:
            return "", ""
        if self.end.initiator == "spot":
            return SPOT_TERMINATION, f"{SPOT_TERMINATION}: Spot instance termination"
        who = "User" if self.end.initiator != "instance" else "Instance"
        code = f"Client.{who}InitiatedShutdown"
        return code, f"{code}: {who} initiated shutdown"

    @property
    def console(self) -> str:
        """What the user data has written so far."""
        file = self._machine.path / "console.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def join(self, timeout: float) -> bool:
        """Waits until the instance has ended; False when it has not within ``timeout`` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- its life, in its own thread ---

    def _live(self) -> None:
        booted = not self._wait_for_end(self._timing.boot)
        while booted and not self.frozen and self._holds.holding(self.launch.run, "boot"):
            booted = not self._wait_for_end(_HELD_SECONDS)
        if booted and self._advance("pending", "running"):
            if not self.frozen:
                self._boot()
            if self.frozen:  # it may have come to that while booting, when there was nothing to freeze
                self._freeze_processes()
            self._wait_for_end(None)
        self._end_processes()
        assert self.end is not None
        time.sleep(max(0.0, self._timing.shutdown - (time.monotonic() - self.end.began)))
        self._advance(self.state, self.end.final)

    def _wait_for_end(self, seconds: float | None) -> bool:
        """Waits for an end that was asked for or scheduled, at most ``seconds``. True when it has come."""
        limit = None if seconds is None else time.monotonic() + seconds
        while True:
            with self._condition:
                if self.end is not None:
                    return True
                now = time.monotonic()
                power_off, taken_back = None if self.power_off_fails else self._power_off_at, self._taken_back_at
                due = min((t for t in (power_off, taken_back) if t is not None), default=None)
                if due is None or now < due:
                    if limit is not None and now >= limit:
                        return False
                    wake = [t - now for t in (limit, due) if t is not None]
                    self._condition.wait(min(wake) if wake else None)
                    continue
            if due == taken_back:
                self._begin_end("spot", "terminated")
            else:
                self.power_off("deadline")

    def _begin_end(self, initiator: Initiator, final: State, by: str = "") -> None:
        with self._condition:
            if self.end is None:
                self.end = _End(initiator, by or initiator, datetime.now(UTC), final)
            elif final == "terminated" and self.end.final == "stopped":
                self.end = _End(initiator, by or initiator, datetime.now(UTC), final)
                if self.state == "stopped":
                    self._set("terminated")  # nothing runs any more, so there is nothing to wait for
            else:
                return
            if self.state in ("pending", "running", "stopping"):
                self._set("shutting-down" if final == "terminated" else "stopping")
            self._condition.notify_all()
        self._changed(self)

    def _advance(self, before: State, after: State) -> bool:
        with self._condition:
            if self.state != before or self.state == after:
                return False
            self._set(after)
        self._changed(self)
        return True

    def _set(self, state: State) -> None:
        self.state = state
        self.history.append((state, datetime.now(UTC)))

    def _boot(self) -> None:
        flags, problem = _shebang_flags(self.launch.user_data)
        if problem:
            (self._machine.path / "console.log").write_text(f"[boot] {self.launch.id}: {problem}\n")
            return
        (self._machine.path / "user-data").write_bytes(self.launch.user_data)
        self._machine.bash_flags.extend(flags)
        guest.install(self._machine)
        console = self._machine.path / "console.log"
        with console.open("ab") as output:
            self._process = spawn(
                guest.command("boot", self._machine.path / "machine.json"),
                env={"PATH": "", **self._machine.environment},
                cwd=self._machine.path,
                stdout=output,
                stderr=output,
            )
        self._root = self._process.pid

    def _freeze_processes(self) -> None:
        """All but the root, which does nothing but end the tree, and must be able to when the local cloud dies."""
        root = self._root
        if root is None:
            return
        while not descendants(root) and self._process.poll() is None:
            time.sleep(0.01)  # it has yet to fork the instance's first process
        freeze(root)

    def _end_processes(self) -> None:
        """SIGTERM, a grace (a frozen instance can make no use of it), SIGKILL; returns when nothing of the instance runs."""
        root = self._root
        if root is None:
            return
        # the root of the tree, and what it forked first, stay to the last: they make sure that nothing is left over
        give_up = time.monotonic() + (0 if self.frozen else TERM_GRACE_SECONDS)
        send(descendants(root), signal.SIGTERM)
        while len(descendants(root)) > 1 and time.monotonic() < give_up:
            time.sleep(0.02)
        send([root], signal.SIGTERM)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            send([root], signal.SIGKILL)
            self._process.wait()
        self._root = None


def _shebang_flags(user_data: bytes) -> tuple[list[str], str]:
    """Options of the script's first line (``#!/bin/bash -ex``), or why it cannot be run."""
    first = user_data.partition(b"\n")[0].decode(errors="replace").strip()
    if not user_data:
        return [], "no user data: the instance idles"
    match = re.fullmatch(r"#!\s*(?:/usr/bin/env\s+|/usr/bin/|/bin/)bash((?:\s+-[eux]+)*)", first)
    if not match:
        return [], f"the local cloud runs user data that is a bash script; its first line is {first[:80]!r}, so nothing is run"
    return match.group(1).split(), ""


class Runner:
    """All instances of one local cloud."""

    def __init__(
        self,
        directory: Path,
        timing: Timing,
        *,
        changed: Callable[[Instance], None],
        entry_point: Sequence[str] = TRAINING_ENTRY_POINT,
        holds: Holds | None = None,
    ) -> None:
        self.holds = holds or Holds()
        bash = shutil.which("bash")
        if bash is None:
            raise RuntimeError("the local cloud runs user data with bash, and there is none on PATH: install bash")
        self._bash = bash
        self._directory, self._timing, self._changed, self._entry_point = directory, timing, changed, list(entry_point)
        self._instances: dict[str, Instance] = {}
        # set once the servers listen
        self.control = ""
        self.environment: dict[str, str] = {}
        self.profile: dict[str, str] = {}

    def launch(self, launch: Launch) -> Instance:
        """Starts the life of an instance; it is ``pending`` when this returns."""
        directory = self._directory / launch.id
        directory.mkdir(parents=True)
        # our own poller goes by the endpoint; boto3 must not ask it for credentials, which come as variables here
        metadata = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.metadata_url(launch.id), "AWS_EC2_METADATA_DISABLED": "true"}
        machine = guest.Machine(
            instance=launch.id,
            control=self.control,
            directory=str(directory),
            bash=self._bash,
            bash_flags=[],
            entry_point=self._entry_point,
            environment={**self.environment, **metadata},
            profile={**self.profile, **metadata},
        )
        instance = Instance(launch, machine, self._timing, self._changed, self.holds)
        self._instances[launch.id] = instance
        instance.start()
        return instance

    def metadata_url(self, instance_id: str) -> str:
        """Where the instance's metadata service is; ``/latest/…`` follows."""
        return f"{self.control}/_sandbox/metadata/{instance_id}"

    def get(self, instance_id: str) -> Instance:
        """KeyError names an unknown id."""
        try:
            return self._instances[instance_id]
        except KeyError:
            raise KeyError(f"no instance {instance_id} was launched in this local cloud") from None

    def all(self) -> list[Instance]:
        return list(self._instances.values())

    def close(self) -> None:
        """Ends every instance and waits until no process of any is left."""
        self.holds.close()
        for instance in self.all():
            instance.terminate("local cloud")
        for instance in self.all():
            if not instance.join(TERM_GRACE_SECONDS + self._timing.shutdown + 10):
                raise RuntimeError(f"{instance.launch.id} did not end; its processes: {instance.pids()}")
