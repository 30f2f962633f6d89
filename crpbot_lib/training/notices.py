"""What tells a job to end before it is done: SIGTERM, and the two notices of a spot instance.

EC2 gives both notices on the instance's metadata service (EC2 User Guide, "Spot Instance interruption notices" and "EC2 instance
rebalance recommendations"): 404 while there is none. They are best effort, so nothing depends on them: without one the training
goes on from the checkpoint of its last epoch.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger(__name__)

DEFAULT_ENDPOINT = "http://169.254.169.254"
POLL_SECONDS = 5.0
"""As often as the EC2 User Guide recommends; the notice comes two minutes before the end."""
_TIMEOUT_SECONDS = 2.0
_TOKEN_SECONDS = 21600
_LONGEST_ANSWER = 4096


class Interrupted(BaseException):
    """The job was told to end; the message says by what. No Exception: nothing on the way may take it for an ordinary failure."""


class Notices:
    """What the job was told so far. Told from a signal handler or another thread, asked between two steps of the training.

    That it is asked is the sign that the job goes on: see ``asked_seconds_ago``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked = clock()
        self._end = threading.Event()
        self._reason = ""
        self._recommended = threading.Event()

    def end(self, reason: str) -> None:
        """The job must end; the first reason counts. Only sets flags, so a signal handler may call it."""
        self._reason = self._reason or reason
        self._end.set()

    def recommend_checkpoint(self) -> None:
        """The instance may soon be interrupted: one checkpoint now, and on."""
        self._recommended.set()

    @property
    def ending(self) -> bool:
        """Whether the job must end."""
        return self._end.is_set()

    def asked_seconds_ago(self) -> float:
        """How long the job has not asked: between two steps or batches, or while it waits for the lake, it always does."""
        return self._clock() - self._asked

    def check(self) -> None:
        """Raises Interrupted once the job must end."""
        self._asked = self._clock()
        if self.ending:
            raise Interrupted(self._reason)

    def wants_checkpoint(self) -> bool:
        """Whether a checkpoint is due before the next step; a recommendation asks for one only."""
        self._asked = self._clock()
        if self.ending:
            return True
        # cleared only where it was seen: one that comes between the two would be lost
        recommended = self._recommended.is_set()
        if recommended:
            self._recommended.clear()
        return recommended

    def pause(self, seconds: float) -> None:
        """Waits so long; raises Interrupted as soon as the job must end."""
        self._end.wait(seconds)
        self.check()

    def wait(self) -> None:
        """Returns when the job must end."""
        self._end.wait()


def endpoint(environment: Mapping[str, str]) -> str | None:
    """Where to ask for notices, by the variables of the AWS SDKs; None: nowhere.

    An address that is given is asked; without one the default, unless ``AWS_EC2_METADATA_DISABLED`` is ``true``.
    """
    if given := environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return given.rstrip("/")
    return None if environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true" else DEFAULT_ENDPOINT


class MetadataPoller:
    """Asks the instance's metadata service (IMDSv2 at ``endpoint``) every few seconds and tells ``notices``. Never raises."""

    def __init__(self, endpoint: str, notices: Notices, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._endpoint, self._notices, self._now = endpoint, notices, now
        # link-local: no proxy of the environment may stand between
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._token: str | None = None
        self._rebalance: dict[str, Any] | None = None
        self._away = False

    def start(self, every: float = POLL_SECONDS) -> None:
        """Polls in a thread until a spot notice has come, or the process ends."""

        def follow() -> None:
            pause = threading.Event()
            while not self.poll():
                pause.wait(every)

        threading.Thread(target=follow, name="notices", daemon=True).start()

    def poll(self) -> bool:
        """Asks once; True when a spot notice has come and there is nothing more to ask for."""
        try:
            action = self._get("spot/instance-action")
            if action is not None:
                reason = f"spot notice: EC2 will {action['action']} this instance at {action['time']}"
                logger.warning("%s%s; stopping at the next step", reason, self._left(action["time"]))
                self._notices.end(reason)
                return True
            rebalance = self._get("events/recommendations/rebalance")
            if rebalance is not None and rebalance != self._rebalance:
                logger.warning(
                    "rebalance recommendation of %s: this instance is at a higher risk of interruption; one checkpoint now",
                    rebalance["noticeTime"],
                )
                self._notices.recommend_checkpoint()
                self._rebalance = rebalance
        except Exception as error:  # whatever stands at that address, or does not, the training goes on
            if not self._away:
                logger.warning(
                    "%s cannot be asked for spot notices (%s: %s): tried again every few seconds, every epoch has its checkpoint",
                    self._endpoint,
                    type(error).__name__,
                    error,
                )
            self._away = True
            return False
        if self._away:
            logger.info("%s answers again: spot notices are seen", self._endpoint)
            self._away = False
        return False

    def _left(self, at: str) -> str:
        try:
            return f", in {(datetime.fromisoformat(at) - self._now()).total_seconds():.0f} s"
        except (ValueError, TypeError):
            return ""

    def _get(self, path: str) -> dict[str, Any] | None:
        """The JSON at ``path``; None where there is none (404). A token that has expired (401) is renewed."""
        for fresh in (False, True):
            if self._token is None or fresh:
                ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
                self._token = self._ask(urllib.request.Request(f"{self._endpoint}/latest/api/token", headers=ttl, method="PUT"))
            request = urllib.request.Request(
                f"{self._endpoint}/latest/meta-data/{path}", headers={"X-aws-ec2-metadata-token": self._token}
            )
            try:
                found: dict[str, Any] = json.loads(self._ask(request))
                return found
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or fresh:
                    raise
        raise AssertionError("the second try returns or raises")

    def _ask(self, request: urllib.request.Request) -> str:
        with self._open(request, timeout=_TIMEOUT_SECONDS) as response:
            text: str = response.read(_LONGEST_ANSWER).decode()
            return text
