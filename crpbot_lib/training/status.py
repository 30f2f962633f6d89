"""``status.json``: what the job does now, and a heartbeat that says it still does."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from crpbot_lib.lake import Lake, keys
from crpbot_lib.training.smoke import marked

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 5.0
FRESH_SECONDS = 60.0
"""An older heartbeat is no sign of life: a dozen of them were not written."""
HANGS_SECONDS = 300.0
"""A job that has not asked its notices for so long hangs, and has no heartbeat: the longest pause of a sound one is reading and
scaling the rows of a symbol."""
State = Literal["running", "succeeded", "failed", "interrupted"]


def _utc_now() -> datetime:
    return datetime.now(UTC)


def health(status: dict[str, Any] | None, generation: int, now: datetime) -> tuple[bool, str]:
    """Whether ``status`` (None: there is none) shows that the job of ``generation`` is alive, and the line that says so."""
    if status is None:
        return False, "the job has written no status yet"
    if status["generation"] != generation:
        return False, f"the status is generation {status['generation']}'s, this is {generation}"
    age = (now - datetime.fromisoformat(status["heartbeat"])).total_seconds()
    return age <= FRESH_SECONDS, f"{status['state']}, heartbeat {age:.0f} s ago (expected within {FRESH_SECONDS:.0f} s)"


class StatusFile:
    """Writes the status of one run, every few seconds. The last state is written once and stays.

    ``since``: the generation from which on the run's work counts; see ``resume``. ``job``: the sha256 of the ``job.json`` that is
    trained by; the run's may be written anew while this one is at work.
    """

    def __init__(
        self,
        lake: Lake,
        run: str,
        generation: int = 0,
        symbols: tuple[str, ...] = (),
        smoke: bool = False,
        since: int = 0,
        now: Callable[[], datetime] = _utc_now,
        job: str | None = None,
    ) -> None:
        self._lake, self._key, self._now = lake, keys.training_run(run, "status.json"), now
        self._smoke = smoke
        # one writer at a time: a heartbeat that was on its way must not land on top of the final state
        self._writer = threading.Lock()
        # held for a moment only: whoever tells how far it is must not wait for a store that does not answer
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._content: dict[str, Any] = {
            "run": run,
            "generation": generation,
            "since": since,
            "job": job,
            "state": "running",
            "started": now().isoformat(),
            "error": None,
            "permanent": False,
            "smoke": smoke,
            "gpu": None,
            "symbols": {symbol: {"state": "pending"} for symbol in symbols},
        }

    def start(self, every: float = HEARTBEAT_SECONDS, idle: Callable[[], float] = lambda: 0.0) -> None:
        """Writes ``running`` and keeps the heartbeat going in a thread, while ``idle`` says that the job has gone on within
        HANGS_SECONDS. LakeError when the first cannot be written."""
        self._write()
        self._thread = threading.Thread(target=self._beat, args=(every, idle), name="heartbeat", daemon=True)
        self._thread.start()

    def gpu(self, name: str | None) -> None:
        """Names the GPU that the job found (None: none)."""
        with self._lock:
            self._content["gpu"] = name

    def symbol(self, symbol: str, **fields: Any) -> None:
        """Updates one symbol's entry; the next heartbeat carries it.

        While a symbol is in training: ``epoch``, ``epochs``, ``step``, ``steps``, ``loss``, ``eta_seconds`` (of this symbol),
        ``validation_loss`` after the last epoch, and ``checkpoint_step``, the last that a checkpoint was written at.
        """
        with self._lock:
            self._content["symbols"][symbol] = {**self._content["symbols"].get(symbol, {}), **fields}

    def finish(self, state: State, error: str | None = None, permanent: bool = False) -> None:
        """The final state; symbols that were still running take it too. May be called again when it cannot be written."""
        self._stop.set()
        with self._lock:
            self._content |= {
                "state": state,
                "error": None if error is None else marked(error, self._smoke),
                "permanent": permanent,
            }
            for own in self._content["symbols"].values():
                if own["state"] == "running":
                    own |= {"state": state, "error": self._content["error"]}
        self._write()

    def _write(self, heartbeat: bool = False) -> None:
        with self._writer:
            if heartbeat and self._stop.is_set():
                return
            with self._lock:
                self._content["heartbeat"] = self._now().isoformat()
                content = copy.deepcopy(self._content)
            self._lake.write_json(self._key, content)

    def _beat(self, every: float, idle: Callable[[], float]) -> None:
        hung = False
        while not self._stop.wait(every):
            if (seconds := idle()) > HANGS_SECONDS:
                if not hung:
                    logger.error("the job has not gone on for %.0f s: no heartbeat until it does", seconds)
                hung = True
                continue
            hung = False
            try:
                self._write(heartbeat=True)
            except Exception as error:  # a store away for a moment must not end the heartbeat; the watcher has its own limit
                logger.warning("heartbeat not written, the next one will be tried: %s: %s", type(error).__name__, error)
