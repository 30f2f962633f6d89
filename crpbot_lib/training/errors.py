"""What can go wrong in a training job, and whether trying again could help."""

from __future__ import annotations


class TrainingError(Exception):
    """The job cannot go on. ``permanent``: the same job would fail in the same way again, so it must not be retried."""

    permanent = False


class PermanentTrainingError(TrainingError):
    """Wrong input, a wrong machine, a diverged model: a retry would repeat it (and pay for it)."""

    permanent = True
