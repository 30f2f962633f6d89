"""The dry-run and the live loop: one decision a minute and symbol, by the promoted models or by one version on trial."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from crpbot_lib import registry
from crpbot_lib.config import Settings
from crpbot_lib.features import DataFetcher, FeatureError, catalog
from crpbot_lib.lake import Lake, LakeError
from crpbot_lib.market_data import MarketData, MarketDataError
from crpbot_lib.runtime import telegram
from crpbot_lib.runtime.market import MarketAt
from crpbot_lib.runtime.predict import MINUTE, NoDecisionError, PredictionError, Signal, decide, live_features, selected, stuck
from crpbot_lib.training import ModelLog, marked

if TYPE_CHECKING:
    from crpbot_lib.training.checkpoint import Checkpoint

logger = logging.getLogger(__name__)
Mode = Literal["dryrun", "live"]


class RuntimeRefusedError(Exception):
    """The loop does not start; the message says what is missing or forbidden."""


def _utc_now() -> datetime:
    return datetime.now(UTC)


def run(
    settings: Settings,
    lake: Lake,
    mode: Mode,
    iterations: int,
    model: str | None = None,
    *,
    symbols: Sequence[str] | None = None,
    clock: Callable[[], datetime] = _utc_now,
    sleep: Callable[[float], None] = time.sleep,
    source: DataFetcher | None = None,
    emit: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """``iterations`` rounds of one decision per symbol (``symbols``, or all that the models cover).

    ``dryrun`` follows ``model``, or the champions; ``live`` follows the champions, re-reads the pointer every minute and sends to
    Telegram. With ``runtime.as_of`` a dry run decides at as_of, +1 min, … without waiting, each time from what was known then;
    otherwise each round waits for a minute to close. ``source`` is where data comes from (None: the settings' endpoints), ``emit``
    takes the signal lines (None: the log).

    Returns mode, model (None when the champions are of several versions), models, iterations, predictions, not_stuck, stuck,
    skipped and smoke: the record that promotion asks for. Raises RuntimeRefusedError, and AlignmentError when a model does not
    fit today's features. A dry run ends with the first error of its data or its models; live names it and tries the next minute,
    and goes on with the models that it has while the lake cannot be read.
    """
    if iterations < 1:
        raise RuntimeRefusedError(f"iterations is {iterations}, expected at least 1")
    as_of = settings.runtime.as_of
    if mode == "live" and as_of is not None:
        raise RuntimeRefusedError(f"live mode decides by the clock, but runtime.as_of is {as_of.isoformat()}; unset it")
    if mode == "live" and model is not None:
        raise RuntimeRefusedError(f"live mode follows promoted models only; promote {model} first, or try it with --mode dryrun")
    versions = _versions(settings, lake, mode, model, symbols)
    models = _load(settings, lake, mode, versions)
    first = None if as_of is None else _minute(as_of)
    until = None if first is None else first + (iterations - 1) * MINUTE
    data = MarketAt(source or MarketData(settings, now=clock if until is None else lambda: until), first or _minute(clock()), until)
    smoke = any(checkpoint.smoke for checkpoint in models.values())
    log = ModelLog(logger, smoke)
    log.info("%s: %d iterations for %s", mode, iterations, ", ".join(f"{s} ({v})" for s, v in versions.items()))
    if mode == "live" and not telegram.enabled(settings.telegram):
        log.warning("live without Telegram: set CRPBOT_TELEGRAM__TOKEN and CRPBOT_TELEGRAM__CHAT_ID to be notified")

    signals: dict[str, list[Signal]] = {symbol: [] for symbol in versions}
    skipped: list[str] = []
    for i in range(iterations):
        at = _next_minute(clock, sleep, settings.runtime.settle_seconds) if first is None else first + i * MINUTE
        data.now = at
        if mode == "live":
            try:
                if (now_promoted := _versions(settings, lake, mode, model, symbols)) != versions:
                    versions, models = now_promoted, _load(settings, lake, mode, now_promoted)
                    logger.info("the promoted models changed: %s", ", ".join(f"{s} ({v})" for s, v in versions.items()))
                    signals = {symbol: [] for symbol in versions}
            except (LakeError, OSError) as error:
                # OSError: a directory as the lake
                logger.warning("the promoted models cannot be read, the loaded ones go on: %s: %s", type(error).__name__, error)
        lines = []
        for symbol, checkpoint in models.items():
            try:
                signal = _decide(settings, symbol, checkpoint, data, at, first_time=not signals[symbol])
            except NoDecisionError as error:
                skipped.append(marked(f"no decision: {error}", checkpoint.smoke))
            except (MarketDataError, FeatureError, PredictionError) as error:
                if mode == "dryrun":
                    raise
                skipped.append(f"{symbol}: no decision at {at.isoformat()}: {error}")
            else:
                signals[symbol].append(signal)
                lines.append(signal.line)
                (emit or logger.info)(signal.line)
                continue
            logger.warning("%s", skipped[-1])
        if mode == "live" and lines:
            telegram.notify(settings, f"{at:%Y-%m-%d %H:%M} UTC\n" + "\n".join(lines))

    causes = {symbol: cause for symbol, found in signals.items() if (cause := stuck(found))}
    for symbol, cause in causes.items():
        ModelLog(logger, models[symbol].smoke).error("%s; run: crpbot models verify %s", cause, versions[symbol])
    if mode == "live" and causes:
        telegram.notify(settings, "\n".join(causes.values()))
    return {
        "mode": mode,
        "model": next(iter(versions.values())) if len(set(versions.values())) == 1 else None,
        "models": versions,
        "iterations": iterations,
        "predictions": [
            {"symbol": s.symbol, "at": s.at.isoformat(), "probability": s.probability, "side": s.side, "line": s.line}
            for found in signals.values()
            for s in found
        ],
        "not_stuck": not causes,
        "stuck": causes,
        "skipped": skipped,
        "smoke": smoke,
    }


def _versions(settings: Settings, lake: Lake, mode: Mode, model: str | None, symbols: Sequence[str] | None) -> dict[str, str]:
    if model is not None:
        available = dict.fromkeys(registry.show(settings, lake, model)["symbols"], model)
    else:
        available = registry.champions(settings, lake)
    if not available:
        hint = "" if mode == "live" else ", or name a version: --model VERSION"
        raise RuntimeRefusedError(f"no model is promoted; promote one (crpbot models promote VERSION){hint}")
    wanted = symbols or ([s.name for s in settings.symbols] if mode == "live" else list(available))
    if missing := [s for s in wanted if s not in available]:
        raise RuntimeRefusedError(f"no model of {', '.join(missing)}: {model or 'promoted'} has {', '.join(available)}")
    return {s: available[s] for s in wanted}


def _load(settings: Settings, lake: Lake, mode: Mode, versions: Mapping[str, str]) -> dict[str, Checkpoint]:
    for version in sorted(set(versions.values())):
        if mode == "live" and registry.show(settings, lake, version)["smoke"]:
            raise RuntimeRefusedError(f"SMOKE {version} is a smoke model: live mode refuses it always; promote a real model")
        registry.verify(settings, lake, version)
    models = {symbol: registry.load_model(settings, lake, version, symbol) for symbol, version in versions.items()}
    if mode == "live" and (smoke := [s for s, checkpoint in models.items() if checkpoint.smoke]):
        raise RuntimeRefusedError(f"SMOKE models of {', '.join(smoke)}: live mode refuses them always; promote real models")
    window = settings.runtime.window_minutes
    for symbol, checkpoint in models.items():
        if window < (needed := catalog.SEGMENT_WARM_UP + checkpoint.config.sequence):
            raise RuntimeRefusedError(
                f"runtime.window_minutes is {window}: {symbol} needs at least {needed}, {catalog.SEGMENT_WARM_UP} of warm-up and "
                f"{checkpoint.config.sequence} of the model's window; raise CRPBOT_RUNTIME__WINDOW_MINUTES"
            )
    return models


def _decide(settings: Settings, symbol: str, checkpoint: Checkpoint, data: DataFetcher, at: datetime, first_time: bool) -> Signal:
    features = live_features(settings.symbol(symbol), data, at, settings.runtime.window_minutes, settings)
    if first_time:
        ModelLog(logger, checkpoint.smoke).info("%s: Numeric features selected: %d", symbol, len(selected(features)))
    return decide(checkpoint, features, at)


def _minute(moment: datetime) -> datetime:
    return moment.replace(second=0, microsecond=0)


def _next_minute(clock: Callable[[], datetime], sleep: Callable[[float], None], settle_seconds: float) -> datetime:
    """Waits until the present minute has closed and its candle can be served; returns when it closed."""
    now = clock()
    at = _minute(now) + MINUTE
    sleep((at - now + timedelta(seconds=settle_seconds)).total_seconds())
    return at
