"""What the earlier instances of a run have done, and on which of it a later one may build.

A symbol is done when its model and metrics agree. Else its training goes on from the newest valid checkpoint: the state of the loop
between two steps, written after each epoch and on an interruption. Data first, then a small JSON with its sha256, and two slots in
turn, so that whoever dies while writing leaves the last good one. Both count only for the same configuration and the same features.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import torch

from crpbot_lib.lake import KeyMissingError, Lake, UnreadableError, keys
from crpbot_lib.training.config import JobSpec
from crpbot_lib.training.smoke import ModelLog
from crpbot_lib.training.trainer import Snapshot

logger = logging.getLogger(__name__)
FORMAT = 3
"""To be raised whenever the network, the optimiser or the loop changes what a Snapshot holds or means."""


def identity(spec: JobSpec, symbol: str) -> dict[str, str]:
    """What decides a symbol's model: equal identities train to equal weights. Part of metrics and of checkpoint notes."""
    told = spec.features[symbol]
    config = f"{spec.train.model_dump_json()}\nsmoke={spec.smoke}\n{','.join(told.names)}"
    return {
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "features_sha256": told.sha256,
        "feature_version": spec.feature_version,
        "catalog": told.catalog,
    }


class Checkpoints:
    """One symbol's earlier work in the lake.

    ``generation`` is this instance's number; what generations before ``since`` left does not count (a deliberate repetition).
    """

    def __init__(self, lake: Lake, spec: JobSpec, symbol: str, generation: int = 0, since: int = 0) -> None:
        self._lake, self._spec, self._symbol, self._generation, self._since = lake, spec, symbol, generation, since
        self._identity = identity(spec, symbol)
        self._log = ModelLog(logger, spec.smoke)
        self._next_slot = 0

    def finished(self) -> dict[str, Any] | None:
        """The metrics of the finished model; None, and a line that says why, where there is none to keep."""
        run, symbol = self._spec.run, self._symbol
        metrics = self._read(keys.run_symbol(run, symbol, "metrics.json"))
        if metrics is None:
            return None
        wrong = self._unlike(metrics)
        if not wrong:
            told = metrics.get("sha256")
            try:
                found = self._lake.sha256(keys.run_symbol(run, symbol, "model.pt"))
            except KeyMissingError:
                found = "none"
            wrong = [] if found == told else [f"model.pt has sha256 {found}, the metrics say {told}"]
            if not self._lake.exists(keys.run_symbol(run, symbol, "evaluation.json")):
                wrong.append("it has no evaluation.json")
        if wrong:
            self._log.warning("%s: the finished model is not this job's, it is trained again: %s", symbol, "; ".join(wrong))
            return None
        return metrics

    def newest(self) -> Snapshot | None:
        """The state of the newest valid checkpoint; None where there is none. Lines say which is taken and why others are not."""
        for slot, note in sorted(self._notes(), key=lambda found: int(found[1]["step"]), reverse=True):
            key = keys.checkpoint(self._spec.run, self._symbol, slot)
            try:
                data = self._lake.read(key)
                if (found := hashlib.sha256(data).hexdigest()) != note["sha256"]:
                    raise ValueError(f"it has sha256 {found}, its note says {note['sha256']}: the writer died in between")
                snapshot = Snapshot(**torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
            except (KeyMissingError, ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                self._ignored(key, str(error))
                continue
            self._log.info(
                "%s: resuming at epoch %s, step %s, of generation %s (%s)",
                self._symbol,
                note["epoch"],
                note["step"],
                note["generation"],
                self._lake.url(key),
            )
            self._next_slot = 1 - keys.CHECKPOINT_SLOTS.index(slot)
            return snapshot
        return None

    def save(self, snapshot: Snapshot, epoch: int) -> bool:
        """Writes a checkpoint in the slot that does not hold the last one; False, and a line, where that failed.

        A store that is away for a moment must not end a training; the next epoch writes again.
        """
        began = time.monotonic()
        slot = keys.CHECKPOINT_SLOTS[self._next_slot]
        key = keys.checkpoint(self._spec.run, self._symbol, slot)
        buffer = io.BytesIO()
        torch.save(vars(snapshot), buffer)
        data = buffer.getvalue()
        note = {
            "format": FORMAT,
            "run": self._spec.run,
            "symbol": self._symbol,
            "generation": self._generation,
            "epoch": epoch,
            "step": snapshot.step,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **self._identity,
        }
        try:
            self._lake.write(key, data)
            self._lake.write_json(keys.checkpoint_note(self._spec.run, self._symbol, slot), note)
        except Exception as error:
            self._log.warning(
                "%s: no checkpoint at epoch %d, step %d: %s: %s", self._symbol, epoch, snapshot.step, type(error).__name__, error
            )
            return False
        self._next_slot = 1 - self._next_slot
        self._log.info(
            "%s: checkpoint at epoch %d, step %d: %s bytes in %.2f s to %s",
            self._symbol,
            epoch,
            snapshot.step,
            f"{len(data):,}",
            time.monotonic() - began,
            self._lake.url(key),
        )
        return True

    def _notes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(slot, note) of the checkpoints that this job may use."""
        for slot in keys.CHECKPOINT_SLOTS:
            key = keys.checkpoint_note(self._spec.run, self._symbol, slot)
            if (note := self._read(key)) is None:
                continue
            wrong = self._unlike(note)
            if note.get("format") != FORMAT:
                wrong = [f"it has format {note.get('format')!r}, this code reads {FORMAT}"]
            if wrong:
                self._ignored(key, "; ".join(wrong))
            else:
                yield slot, note

    def _unlike(self, written: dict[str, Any]) -> list[str]:
        """In what this work differs from the job's."""
        if (generation := int(written.get("generation", 0))) < self._since:
            return [f"it is of generation {generation}, and the run was begun anew with {self._since}"]
        told = self._identity.items()
        return [f"{name} is {written.get(name)}, the job's is {value}" for name, value in told if written.get(name) != value]

    def _read(self, key: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._lake.read_json(key)
        except KeyMissingError:
            return None
        except UnreadableError as error:
            self._ignored(key, str(error))
            return None
        return found

    def _ignored(self, key: str, why: str) -> None:
        self._log.warning("%s: %s is not used: %s", self._symbol, self._lake.url(key), why)
