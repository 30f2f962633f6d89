"""The one place that marks a line about a smoke model, so that nobody takes one for a real model."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any


def marked(text: str, smoke: bool) -> str:
    """``text``, beginning with SMOKE where it speaks about a smoke model."""
    return f"SMOKE {text}" if smoke else text


class ModelLog(logging.LoggerAdapter[logging.Logger]):
    """A module's logger for lines about one model (or one job): every line of a smoke model begins with SMOKE."""

    def __init__(self, logger: logging.Logger, smoke: bool) -> None:
        super().__init__(logger)
        self.smoke = smoke

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return marked(str(msg), self.smoke), kwargs
