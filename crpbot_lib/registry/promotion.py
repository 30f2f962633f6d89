"""``promoted.json``: which version the runtime follows for each symbol, and how it came to that.

``{"symbols": {symbol: version}, "history": [entry, …]}``. An entry holds the state after it and ``previous``, the place in the
history of the state it replaced, so that rolling back twice goes back two steps and does not return to where it started.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from math import isfinite, nan
from typing import Any

from crpbot_lib.config import Settings
from crpbot_lib.lake import KeyMissingError, Lake, keys
from crpbot_lib.registry.errors import AlignmentError, PromotionRefusedError, RegistryError
from crpbot_lib.registry.versions import show, verify
from crpbot_lib.training import ModelLog, marked

logger = logging.getLogger(__name__)


def _utc_now() -> datetime:
    return datetime.now(UTC)


def champions(settings: Settings, lake: Lake) -> dict[str, str]:
    """Symbol -> promoted version; empty while nothing is promoted."""
    return dict(_read(settings, lake)["symbols"])


def promote(
    settings: Settings,
    lake: Lake,
    version: str,
    evidence: Mapping[str, Any],
    now: Callable[[], datetime] = _utc_now,
) -> dict[str, Any]:
    """Points every symbol of ``version`` to it. ``evidence`` is the record of its dry run (``runtime.run``).

    Returns version, smoke, symbols (all that is promoted now) and message, a sentence for people. Promoting what is promoted
    already changes nothing. Raises PromotionRefusedError with every reason: not aligned, no dry run
    of this version, predictions stuck, too few finite predictions of a symbol, a smoke model without ``promotion.allow_smoke``,
    a real one without skill on its test rows and without ``promotion.allow_without_skill``.
    """
    manifest = show(settings, lake, version)
    reasons = _reasons_against(settings, manifest, evidence)
    try:
        verify(settings, lake, version)
    except AlignmentError as error:
        reasons.append(str(error))
    if reasons:
        raise PromotionRefusedError(f"version {version} is not promoted: {'; '.join(reasons)}")
    pointer = _read(settings, lake)
    state = {**pointer["symbols"], **dict.fromkeys(manifest["symbols"], version)}
    if state != pointer["symbols"]:
        previous = len(pointer["history"]) - 1 if pointer["history"] else None
        _append(settings, lake, pointer, "promote", version, state, previous, dict(evidence), now())
    message = f"version {version} promoted for {', '.join(manifest['symbols'])}"
    ModelLog(logger, manifest["smoke"]).info("%s", message)
    return {
        "version": version,
        "smoke": manifest["smoke"],
        "symbols": state,
        "message": marked(message, manifest["smoke"]),
    }


def check_promotable(settings: Settings, lake: Lake, version: str) -> None:
    """PromotionRefusedError for what no dry run could change: a smoke model without ``promotion.allow_smoke``, a real one without
    skill and without ``promotion.allow_without_skill``."""
    manifest = show(settings, lake, version)
    if reasons := [*_smoke_reasons(settings, manifest), *_skill_reasons(settings, manifest)]:
        raise PromotionRefusedError(f"version {version} is not promoted: {'; '.join(reasons)}")


def rollback(settings: Settings, lake: Lake, now: Callable[[], datetime] = _utc_now) -> dict[str, Any]:
    """Back to the state before the present one; again: one further back.

    Raises RegistryError when there is none, PromotionRefusedError when a version of it is no longer aligned or allowed.
    """
    pointer = _read(settings, lake)
    history = pointer["history"]
    target = history[-1]["previous"] if history else None
    if target is None:
        raise RegistryError("nothing to roll back to: promoted.json has no earlier state")
    state: dict[str, str] = history[target]["symbols"]
    reasons = []
    smoke = False
    for version in sorted(set(state.values())):
        manifest = show(settings, lake, version)
        smoke |= manifest["smoke"]
        reasons += _smoke_reasons(settings, manifest)
        try:
            verify(settings, lake, version)
        except AlignmentError as error:
            reasons.append(str(error))
    if reasons:
        raise PromotionRefusedError(f"no roll-back to {history[target]['version']}: {'; '.join(reasons)}")
    _append(settings, lake, pointer, "rollback", history[target]["version"], state, history[target]["previous"], None, now())
    message = "rolled back to " + ", ".join(f"{symbol} {version}" for symbol, version in state.items())
    ModelLog(logger, smoke).info("%s", message)
    return {"version": history[target]["version"], "smoke": smoke, "symbols": state, "message": marked(message, smoke)}


def _reasons_against(settings: Settings, manifest: dict[str, Any], evidence: Mapping[str, Any]) -> list[str]:
    reasons = [*_smoke_reasons(settings, manifest), *_skill_reasons(settings, manifest)]
    version, asked = manifest["version"], settings.promotion.dry_run_iterations
    if evidence.get("model") != version:
        reasons.append(
            f"the evidence is a dry run of {evidence.get('model')!r}; run: crpbot runtime --mode dryrun --model {version}"
        )
    if evidence.get("not_stuck") is not True:
        reasons.append("its dry run's predictions are stuck (or it does not say otherwise)")
    # rounds prove nothing: a round may have had no decision
    decided = Counter(p["symbol"] for p in evidence.get("predictions", ()) if isfinite(p.get("probability", nan)))
    reasons += [
        f"its dry run has {decided[symbol]} finite predictions of {symbol}, promotion asks for {asked}"
        for symbol in manifest["symbols"]
        if decided[symbol] < asked
    ]
    return reasons


def _smoke_reasons(settings: Settings, manifest: dict[str, Any]) -> list[str]:
    if manifest["smoke"] and not settings.promotion.allow_smoke:
        return [f"SMOKE {manifest['version']} is a smoke model and promotion.allow_smoke is off; train a real one"]
    return []


def _skill_reasons(settings: Settings, manifest: dict[str, Any]) -> list[str]:
    """Out-of-sample evidence, by what training measured. Not asked of a roll-back: what was promoted once may be gone back to."""
    if manifest["smoke"] or settings.promotion.allow_without_skill:
        return []
    verdicts = {s: entry["metrics"] for s, entry in manifest["symbols"].items() if entry["metrics"].get("skill") is not True}
    return [
        f"{symbol}: {metrics.get('verdict', 'no verdict: it was trained before there were any')}; train on more days, or set "
        "promotion.allow_without_skill"
        for symbol, metrics in verdicts.items()
    ]


def _read(settings: Settings, lake: Lake) -> dict[str, Any]:
    try:
        pointer: dict[str, Any] = lake.read_json(keys.promoted(settings.training.prefix))
    except KeyMissingError:
        return {"symbols": {}, "history": []}
    return pointer


def _append(
    settings: Settings,
    lake: Lake,
    pointer: dict[str, Any],
    action: str,
    version: str,
    state: dict[str, str],
    previous: int | None,
    evidence: dict[str, Any] | None,
    at: datetime,
) -> None:
    entry = {
        "at": at.isoformat(),
        "action": action,
        "version": version,
        "symbols": state,
        "previous": previous,
        "evidence": evidence,
    }
    lake.write_json(keys.promoted(settings.training.prefix), {"symbols": state, "history": [*pointer["history"], entry]})
