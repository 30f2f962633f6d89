"""What all DAGs share: owner, tags, retry behaviour, and the bridge from a task to a step of crpbot_lib."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from typing import Any

from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowFailException

from crpbot_lib.config import Settings, settings

OWNER = "crpbot"


class Tag(StrEnum):
    """The closed set of DAG tags."""

    DATA = "data"
    TRAINING = "training"
    MODELS = "models"
    GPU = "gpu"
    SAFETY = "safety"


MODELS_ASSET = Asset("crpbot_models")
"""Published model versions. An event's extra carries ``version``."""


def default_args() -> dict[str, Any]:
    """The default arguments of every DAG: retries with growing delays, and a time limit on every task."""
    orchestration = settings().orchestration
    return {
        "owner": OWNER,
        "retries": orchestration.retries,
        "retry_delay": timedelta(seconds=orchestration.retry_delay_seconds),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=15),
        "execution_timeout": timedelta(hours=2),
    }


def run_step(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs ``step(settings, lake, *args, **kwargs)`` of crpbot_lib inside a task.

    An error that would repeat (see ``permanent_errors``) fails the task without a retry.
    """
    from crpbot_lib.lake import Lake

    current: Settings = settings()
    try:
        return step(current, Lake(current.lake), *args, **kwargs)
    except permanent_errors() as error:
        raise AirflowFailException(f"{type(error).__name__}: {error}") from error


def permanent_errors() -> tuple[type[Exception], ...]:
    """Errors of crpbot_lib that another try would only repeat: wrong parameters, misaligned features, a refused launch."""
    from pydantic import ValidationError

    from crpbot_lib.features.errors import FeatureError
    from crpbot_lib.gpu.launch import LaunchRefusedError
    from crpbot_lib.registry import AlignmentError, PromotionRefusedError
    from crpbot_lib.training import TrainingError

    return (ValidationError, ValueError, FeatureError, LaunchRefusedError, AlignmentError, PromotionRefusedError, TrainingError)
