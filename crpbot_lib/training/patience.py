"""Patience with a lake that is away for a moment: what an instance was paid for is not lost to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import BotoCoreError

from crpbot_lib.lake import KeyExistsError, KeyMissingError, LakeError, UnreadableError
from crpbot_lib.training.smoke import ModelLog

T = TypeVar("T")
PATIENCE_SECONDS = 180.0
"""So long the job reads or writes anew what it cannot do without. Heartbeats and checkpoints are not waited for."""
_PAUSES = (1.0, 2.0, 5.0, 10.0)
_ANSWERS = (KeyMissingError, KeyExistsError, UnreadableError)
_REFUSED = (403, 404)
"""HTTP: access denied, no such bucket."""


def patiently(
    action: Callable[[], T],
    log: ModelLog,
    pause: Callable[[float], object],
    seconds: float = PATIENCE_SECONDS,
    now: Callable[[], float] = time.monotonic,
) -> T:
    """The result of ``action``, which may be done twice, tried anew with growing pauses while the lake is away.

    What is an answer (absent, unreadable, there already) or a refusal (access denied, a full disk) is raised at once, the last
    LakeError after ``seconds``. ``pause`` may raise to end the waiting.
    """
    began, tries = now(), 0
    while True:
        try:
            return action()
        except LakeError as error:
            wait = _PAUSES[min(tries, len(_PAUSES) - 1)]
            tries += 1
            if _final(error) or now() - began + wait > seconds:
                raise
            log.warning("the lake does not answer, tried again in %.0f s (try %d): %s", wait, tries, error)
        pause(wait)


def _final(error: LakeError) -> bool:
    """Whether asking again would be answered the same way."""
    cause = error.__cause__
    # some of botocore's errors are OSErrors: a timeout, a broken TLS connection
    if isinstance(error, _ANSWERS) or (isinstance(cause, OSError) and not isinstance(cause, BotoCoreError)):
        return True
    response = getattr(cause, "response", None) or {}
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _REFUSED
