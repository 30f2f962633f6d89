"""``python -m crpbot_lib.training``: the container's entry point.

Environment: ``CRPBOT_LAKE`` (the lake's address), ``CRPBOT_RUN`` (the run whose ``job.json`` to follow),
``CRPBOT_GENERATION`` (the instance's number within the run), AWS's own variables, those of the metadata service among them.
Exit status: 0 succeeded, 1 failed (a retry may help), 65 failed for good, 75 interrupted by SIGTERM or a spot notice.
With ``--health``, in the same environment: 0 while that job's heartbeat reaches the lake, else 1; the image's HEALTHCHECK.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from types import FrameType

from crpbot_lib.config import settings
from crpbot_lib.lake import Lake, LakeError
from crpbot_lib.training import job
from crpbot_lib.training.errors import TrainingError
from crpbot_lib.training.notices import Interrupted, MetadataPoller, Notices, endpoint
from crpbot_lib.training.spec import read_status
from crpbot_lib.training.status import health

EXIT_FAILED, EXIT_PERMANENT, EXIT_INTERRUPTED = 1, 65, 75
LONGEST_STOP_SECONDS = 60.0
"""A spot notice comes 120 s before the end; what has not stopped in order by half of it hangs, and is ended as it stands."""
logger = logging.getLogger(__name__)


def _stop_in_time(notices: Notices) -> None:
    notices.wait()
    time.sleep(LONGEST_STOP_SECONDS)
    logger.error("told to end %.0f s ago and not done: ending now, the last written checkpoint counts", LONGEST_STOP_SECONDS)
    os._exit(EXIT_INTERRUPTED)


def _health(lake: Lake, run_id: str, generation: int) -> int:
    """What an orchestrator sees of the job: a store that is away is as bad as a job that hangs."""
    try:
        healthy, said = health(read_status(lake, run_id), generation, datetime.now(UTC))
    except Exception as error:
        healthy, said = False, f"the status of run {run_id} cannot be read: {type(error).__name__}: {error}"
    logger.log(logging.INFO if healthy else logging.ERROR, said)
    return 0 if healthy else EXIT_FAILED


def main() -> int:
    """Runs the job named by the environment; returns the exit status."""
    # a StreamHandler flushes after every record, so each line is visible at once, whatever buffers stdout has
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)sZ %(levelname)s %(message)s")
    logging.Formatter.converter = time.gmtime
    # it tells of its font cache, which is no word about the run
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    run_id = os.environ.get("CRPBOT_RUN", "")
    if not run_id or not settings().lake:
        logger.error("CRPBOT_LAKE and CRPBOT_RUN must both be set: where the lake is, and which run's job.json to follow")
        return EXIT_PERMANENT
    try:
        lake, generation = Lake(settings().lake), int(os.environ.get("CRPBOT_GENERATION", "0"))
    except (LakeError, ValueError) as error:
        logger.error("CRPBOT_LAKE or CRPBOT_GENERATION is wrong: %s; the former is a lake, the latter a whole number", error)
        return EXIT_PERMANENT
    if sys.argv[1:] == ["--health"]:
        return _health(lake, run_id, generation)
    if sys.argv[1:]:
        logger.error("unknown arguments %s: the job takes none, all is in the environment and in its job.json", sys.argv[1:])
        return EXIT_PERMANENT
    notices = Notices()

    def on_sigterm(number: int, _frame: FrameType | None) -> None:
        # a second signal must not meet the first one's flags half set
        signal.signal(number, signal.SIG_IGN)
        notices.end("SIGTERM: the process was told to end")

    signal.signal(signal.SIGTERM, on_sigterm)
    threading.Thread(target=_stop_in_time, args=(notices,), name="stop-in-time", daemon=True).start()
    if address := endpoint(os.environ):
        MetadataPoller(address, notices).start()
    try:
        job.run(lake, run_id, generation, notices=notices)
    except Interrupted:
        return EXIT_INTERRUPTED
    except TrainingError as error:
        return EXIT_PERMANENT if error.permanent else EXIT_FAILED
    except Exception:
        # the job has said in one line what failed; where is what the traceback adds
        traceback.print_exc(file=sys.stdout)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
