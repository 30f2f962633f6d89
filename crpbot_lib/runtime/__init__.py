"""The runtime: live features, prediction, the dry-run and live loops, Telegram. Importing it imports no torch."""

from crpbot_lib.runtime.loop import Mode, RuntimeRefusedError, run
from crpbot_lib.runtime.predict import Signal

__all__ = ["Mode", "RuntimeRefusedError", "Signal", "run"]
