"""``python -m crpbot_lib.training``: the container's entry point.

Environment: ``CRPBOT_LAKE`` (the lake's address), ``CRPBOT_RUN`` (the run whose ``job.json`` to follow),
``CRPBOT_GENERATION`` (the instance's number within the run), AWS's own variables.
Exit status: 0 succeeded, 1 failed (a retry may help), 65 failed for good, 75 interrupted by SIGTERM.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from types import FrameType

from crpbot_lib.config import settings
from crpbot_lib.lake import Lake
from crpbot_lib.training import job
from crpbot_lib.training.errors import TrainingError

EXIT_FAILED, EXIT_PERMANENT, EXIT_INTERRUPTED = 1, 65, 75
logger = logging.getLogger(__name__)


def _on_sigterm(number: int, _frame: FrameType | None) -> None:
    # a second signal must not interrupt the writing of the final status
    signal.signal(number, signal.SIG_IGN)
    raise job.Interrupted


def main() -> int:
    """Runs the job named by the environment; returns the exit status."""
    # a StreamHandler flushes after every record, so each line is visible at once, whatever buffers stdout has
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)sZ %(levelname)s %(message)s")
    logging.Formatter.converter = time.gmtime
    run_id = os.environ.get("CRPBOT_RUN", "")
    if not run_id or not settings().lake:
        logger.error("CRPBOT_LAKE and CRPBOT_RUN must both be set: where the lake is, and which run's job.json to follow")
        return EXIT_PERMANENT
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        job.run(Lake(settings().lake), run_id, int(os.environ.get("CRPBOT_GENERATION", "0")))
    except job.Interrupted:
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
