"""What all DAGs share: owner, tags, retry behaviour, and the bridge from a task to a step of crpbot_lib."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
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


def scheduled(timetable: Any, by_hand: Any = None) -> Any:
    """``timetable``, or ``by_hand`` where the setting ``orchestration.schedules`` is off."""
    return timetable if settings().orchestration.schedules else by_hand


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


def symbols_schema(known: list[str]) -> dict[str, Any]:
    """Of a parameter that names some of the ``known`` symbols: a list to choose from in the UI, refused before the run if wrong."""
    return {
        "type": "array",
        "items": {"type": "string", "enum": known},
        "examples": known,
        "minItems": 1,
        "uniqueItems": True,
    }


def interval(params: dict[str, Any]) -> tuple[date, date]:
    """The UTC days ``start`` and ``end`` of a run's parameters."""
    return date.fromisoformat(params["start"]), date.fromisoformat(params["end"])


def day_of(partition_key: str) -> date:
    """The UTC day that a run's partition key names. AirflowFailException where it names none: another try would not either."""
    try:
        return date.fromisoformat(partition_key)
    except ValueError as error:
        raise AirflowFailException(
            f"the run's partition key is {partition_key!r}, expected a UTC day like 2025-05-26: start another run and give it one"
        ) from error


def run_step(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs ``step(settings, lake, *args, **kwargs)`` of crpbot_lib inside a task, with the settings of this process and the Airflow
    Connections that they name (``connections``).

    An error that would repeat (see ``is_permanent``) fails the task without a retry.
    """
    from crpbot_airflow.connections import with_connections
    from crpbot_lib.lake import Lake

    try:
        current: Settings = with_connections(settings())
        return step(current, Lake(current.lake), *args, **kwargs)
    except Exception as error:
        if is_permanent(error):
            raise AirflowFailException(f"{type(error).__name__}: {error}") from error
        raise


def tell_failure(context: Any) -> None:
    """An ``on_failure_callback``: tells the Telegram chat, where one is configured, of a run that failed or an instance that may
    live. Airflow calls it when no try is left."""
    from crpbot_lib.runtime import telegram

    ti = context["ti"]
    text = f"FAILED {ti.dag_id} / {ti.task_id}, run {ti.run_id}: {context.get('exception')}. See its log, and `crpbot gpu list`"
    telegram.notify(settings(), text)


def is_permanent(error: Exception) -> bool:
    """Whether another try would only repeat ``error``: wrong parameters, misaligned features, a refused launch or promotion.

    ValueError is among them: the steps raise it (pydantic's and the features' errors are ones) for a value that is wrong.
    """
    from crpbot_lib.gpu.launch import LaunchRefusedError
    from crpbot_lib.registry import AlignmentError, PromotionRefusedError
    from crpbot_lib.runtime import RuntimeRefusedError

    kinds = (ValueError, LaunchRefusedError, AlignmentError, PromotionRefusedError, RuntimeRefusedError)
    return bool(getattr(error, "permanent", False)) or isinstance(error, kinds)
