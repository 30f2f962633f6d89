"""What a model is worth on later rows it never saw, and how sure that is. numpy only.

Every figure is of the test anchors, on which nothing was chosen or fitted; the one thing fitted here, the temperature, is fitted on
the validation anchors. AUC, log loss and Brier score are a line each, so nothing is installed in the training image for them; the
intervals are ours to get right (``bootstrap``). Where a figure cannot be had it is None, and its ``…_note`` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from crpbot_lib.training.bootstrap import LEVEL, NoIntervalError, Values, interval
from crpbot_lib.training.dataset import Floats, Ints

CALIBRATION_BINS = 10
ROLLING_POINTS = 60
_MINUTE_US = 60_000_000
_DAY_MINUTES = 1440
_TEMPERATURES = (0.01, 100.0)
_SIDES = ("DOWN", "UP")


@dataclass(frozen=True)
class Scores:
    """What a model said at some anchors, chronologically, and what came: arrays of one length.

    ValueError where they are not, where there is none, and for a score or label that is not finite.
    """

    timestamps: Ints
    """Microseconds of the anchors' rows."""
    logits: Floats
    """Of UP."""
    labels: Floats
    """1.0 where the price rose, else 0.0."""

    def __post_init__(self) -> None:
        n = len(self.timestamps)
        if not n or len(self.logits) != n or len(self.labels) != n:
            raise ValueError(
                f"{n} timestamps, {len(self.logits)} scores and {len(self.labels)} labels; expected one of each a window"
            )
        for name, of in (("scores", self.logits), ("labels", self.labels)):
            if wrong := int((~np.isfinite(of)).sum()):
                raise ValueError(f"{wrong:,} of {n:,} {name} are NaN or infinite: nothing can be said of the model")

    def __len__(self) -> int:
        return len(self.timestamps)

    def at(self, chosen: npt.NDArray[Any]) -> Scores:
        """Those of the ``chosen`` anchors (mask or indices)."""
        return Scores(self.timestamps[chosen], self.logits[chosen], self.labels[chosen])

    @property
    def up(self) -> npt.NDArray[np.bool_]:
        rose: npt.NDArray[np.bool_] = self.labels == 1
        return rose

    @property
    def hits(self) -> Values:
        """1.0 where the side named, UP from a logit of 0 on, is the one that came."""
        right: Values = ((self.logits >= 0) == self.up).astype(np.float64)
        return right

    def probabilities(self, temperature: float = 1.0) -> Values:
        """Of UP; a temperature above 1 draws them towards 50 %."""
        z = self.logits.astype(np.float64) / temperature
        said: Values = np.exp(-np.logaddexp(0, -z))
        return said

    def losses(self, temperature: float = 1.0) -> Values:
        """The log loss of each, in nats; of the logits, so that no probability is rounded to 0 or 1."""
        z = self.logits.astype(np.float64) / temperature
        lost: Values = np.logaddexp(0, z) - self.labels * z
        return lost


def auc(scores: Scores) -> tuple[float, Values]:
    """The area under the ROC curve, ties counting half, and for each window the term that it adds: their mean is the area.

    The terms are DeLong's (1988): to first order the area is a mean of them, so its interval is that of their mean. ValueError
    where one side never came.
    """
    up, z = scores.up, scores.logits
    if up.all() or not up.any():
        raise ValueError(_one_side(scores))
    # of each score: the share of the other side's scores that it ranks rightly against
    won = np.empty(len(scores))
    for side in (up, ~up):
        others = np.sort(z[~side])
        places = np.searchsorted(others, z[side], side="left") + np.searchsorted(others, z[side], side="right")
        won[side] = places / (2 * len(others))
    won[~up] = 1 - won[~up]
    area = float(won[up].mean())
    terms: Values = area + (won - area) / np.where(up, up.mean(), 1 - up.mean())
    return area, terms


def fit_temperature(scores: Scores) -> float:
    """The temperature that makes these scores' probabilities most likely (Guo et al. 2017), between 0.01 and 100.

    Scores that say nothing, or the opposite, get 100: all their probabilities are then near 50 %. ValueError where there is none:
    one side never came, or every logit is 0.
    """
    if scores.up.all() or not scores.up.any():
        raise ValueError(_one_side(scores))
    z = scores.logits.astype(np.float64)
    if not z.any():
        raise ValueError("every score is exactly 50 %")
    # the log loss is convex in the inverse of the temperature, so its slope crosses 0 once
    low, high = 1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0]
    for _ in range(60):
        middle = sqrt(low * high)
        slope = float(np.mean((scores.probabilities(1 / middle) - scores.labels) * z))
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / sqrt(low * high)


def evaluate(test: Scores, validation: Scores, horizon: int, train_base_rate: float, level: float = LEVEL) -> dict[str, Any]:
    """The figures of one model, flat, and its verdict.

    ``x_low`` and ``x_high`` bound ``x`` with probability ``level``. ``base_…`` is what always saying ``train_base_rate``, the
    training rows' share of UP, gets. ``gain`` is the accuracy less that of always naming one side, UP or DOWN, whichever is the
    harder to beat on these rows: known in hindsight only, so no drift of the market passes for skill. ``skill`` is True where its
    lower bound is above 0, False where it is not, None where no interval can be had; ``verdict`` says it in words.
    ``accuracy_se`` is the rough one of ``effective_n`` = windows / horizon independent labels, which asks for no minimum of rows.

    ValueError where the training rows had one side only.
    """
    if not 0 < train_base_rate < 1:
        raise ValueError(f"the training rows' share of UP is {train_base_rate:g}: with one side only there was nothing to learn")
    n, at, up = len(test), test.timestamps, test.up
    hits, losses = test.hits, test.losses()
    accuracy, base_rate = float(hits.mean()), float(up.mean())
    effective = max(1, n // horizon)
    base_losses = -np.log(np.where(up, train_base_rate, 1 - train_base_rate))
    figures: dict[str, Any] = {
        "level": level,
        "train_base_rate": train_base_rate,
        "test_windows": n,
        "validation_windows": len(validation),
        "effective_n": effective,
        "base_rate": base_rate,
        "majority_accuracy": max(base_rate, 1 - base_rate),
        **bounded("accuracy", hits, at, horizon, level),
        "accuracy_se": sqrt(max(accuracy * (1 - accuracy), 1 / effective / 4) / effective),
        "log_loss": float(losses.mean()),
        "base_log_loss": float(base_losses.mean()),
        **bounded("log_loss_gain", base_losses - losses, at, horizon, level),
        "brier": float(np.mean((test.probabilities() - test.labels) ** 2)),
        "base_brier": float(np.mean((train_base_rate - test.labels) ** 2)),
        "validation_accuracy": float(validation.hits.mean()),
        "validation_log_loss": float(validation.losses().mean()),
        "validation_base_log_loss": float(-np.log(np.where(validation.up, train_base_rate, 1 - train_base_rate)).mean()),
    }
    try:
        figures |= bounded("auc", auc(test)[1], at, horizon, level)
    except ValueError as none:
        figures |= {"auc": None, "auc_low": None, "auc_high": None, "auc_note": str(none)}
    try:
        temperature = fit_temperature(validation)
        figures |= {
            "temperature": temperature,
            "temperature_note": None,
            "calibrated_log_loss": float(test.losses(temperature).mean()),
        }
    except ValueError as none:
        figures |= {"temperature": None, "temperature_note": f"of the validation rows: {none}", "calibrated_log_loss": None}
    return figures | _verdict(test, horizon, level)


def _verdict(test: Scores, horizon: int, level: float) -> dict[str, Any]:
    said_up = test.logits >= 0
    try:
        if test.up.all() or not test.up.any():
            raise NoIntervalError(_one_side(test))
        if np.ptp(test.logits) == 0:
            return _no_gain(f"no skill shown: it gives the same score, {test.probabilities()[0]:.3f}, in all {len(test):,} windows")
        if said_up.all() or not said_up.any():
            return _no_gain(f"no skill shown: it names {_SIDES[bool(said_up[0])]} in all {len(test):,} windows")
        gains = [interval(test.hits - (test.up == side), test.timestamps, horizon, level) for side in (False, True)]
    except NoIntervalError as none:
        return {"gain": None, "gain_low": None, "gain_high": None, "skill": None, "verdict": f"no verdict: {none}"}
    # of the smaller of the two gains: above 0 only if both are, and no greater than either
    value, low, high = (min(bound) for bound in zip(*((g.value, g.low, g.high) for g in gains), strict=True))
    skill = low > 0
    points = f"{100 * value:z.1f} points of accuracy ({100 * low:z.1f} to {100 * high:z.1f} at {100 * level:g} %)"
    words = f"better than the base rate by {points}" if skill else f"no skill shown: {points} against the base rate"
    return {"gain": value, "gain_low": low, "gain_high": high, "skill": skill, "verdict": words}


def _no_gain(words: str) -> dict[str, Any]:
    return {"gain": None, "gain_low": None, "gain_high": None, "skill": False, "verdict": words}


def _one_side(scores: Scores) -> str:
    return f"the price went {_SIDES[bool(scores.up[0])]} after all {len(scores):,} windows"


def bounded(name: str, values: Values, timestamps: Ints, horizon: int, level: float = LEVEL) -> dict[str, Any]:
    """``name`` with ``_low``, ``_high`` and ``_note``: the mean of ``values`` with its interval, or why there is none."""
    try:
        of = interval(values, timestamps, horizon, level)
    except NoIntervalError as none:
        return {name: float(values.mean()), f"{name}_low": None, f"{name}_high": None, f"{name}_note": str(none)}
    return {name: of.value, f"{name}_low": of.low, f"{name}_high": of.high, f"{name}_note": None}


def calibration(test: Scores, temperature: float | None, horizon: int) -> list[dict[str, Any]]:
    """The calibration curve: the windows in bins of equal size by the probability said, and per bin what was said (raw, and at
    ``temperature``) and how often UP came, with its interval. Equal scores stay in one bin."""
    said = test.probabilities()
    edges = np.unique(np.quantile(said, np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS))
    bin_of = np.searchsorted(edges, said, side="left")
    rows = []
    for b in np.unique(bin_of):
        own = test.at(bin_of == b)
        scaled = None if temperature is None else float(own.probabilities(temperature).mean())
        up = bounded("share_up", own.labels.astype(np.float64), own.timestamps, horizon)
        rows.append({"windows": len(own), "probability": float(own.probabilities().mean()), "calibrated": scaled, **up})
    return rows


def by_part(test: Scores, parts: Sequence[str], of_each: npt.NDArray[np.str_], horizon: int) -> list[dict[str, Any]]:
    """Accuracy with its interval, log loss and share of UP of each of ``parts`` that the test anchors have; ``of_each`` names every
    anchor's."""
    rows = []
    for part in parts:
        if not (chosen := of_each == part).any():
            continue
        own = test.at(chosen)
        accuracy = bounded("accuracy", own.hits, own.timestamps, horizon)
        figures = {"windows": len(own), "base_rate": float(own.up.mean()), "log_loss": float(own.losses().mean())}
        rows.append({"part": part, **figures, **accuracy})
    return rows


def months(timestamps: Ints) -> npt.NDArray[np.str_]:
    """The UTC month of each, as 2025-05."""
    return timestamps.astype("datetime64[us]").astype("datetime64[M]").astype(str)


def rolling_accuracy(test: Scores, horizon: int) -> dict[str, Any]:
    """The accuracy over windows of ``minutes`` that end at up to ``ROLLING_POINTS`` times; without bounds where so short a time
    carries no interval.

    ``minutes``: a day, or a tenth of the test rows' time where that is longer, or half of it where that is shorter.
    """
    minute = (test.timestamps - test.timestamps[0]) // _MINUTE_US
    last = int(minute[-1])
    width = max(min(_DAY_MINUTES, (last + 1) // 2), last // 10, 1)
    points = []
    for end in np.unique(np.linspace(width, last + 1, ROLLING_POINTS).astype(np.int64)):
        first, stop = np.searchsorted(minute, [end - width, end])
        if stop - first < horizon:
            continue
        own = test.at(np.arange(first, stop))
        bounds = bounded("accuracy", own.hits, own.timestamps, horizon)
        at = (test.timestamps[0] + int(end) * _MINUTE_US).astype("datetime64[us]").astype("datetime64[s]")
        points.append({"end": f"{at}Z", "windows": len(own), **bounds})
    return {"minutes": width, "points": points}


def back_test(timestamps: Ints, logits: Floats, moves: Values, fee_bps: float, horizon: int) -> dict[str, Any]:
    """What following every call would have left: information only, no evidence of skill and no forecast of a profit.

    One position at a time, opened at an anchor's close on the side named and closed ``horizon`` minutes later; each of the two
    orders costs ``fee_bps`` of the price. Without spread, slippage or market impact: less would have been left. Nor is anything
    opened that an outage would have kept open. ``moves``: the relative change of the close over the horizon, per anchor. All
    amounts in basis points of the price, a trade.
    """
    minute = (timestamps - timestamps[0]) // _MINUTE_US
    taken, free = [], 0
    for i, at in enumerate(minute.tolist()):
        if at >= free:
            taken.append(i)
            free = at + horizon
    chosen = np.array(taken)
    gross = np.where(logits[chosen] >= 0, 1, -1) * moves[chosen] * 1e4
    net = gross - 2 * fee_bps
    return {
        "note": "information only: fees as set, no spread, slippage or market impact",
        "fee_bps_per_order": fee_bps,
        "trades": len(chosen),
        "gross_bps": float(gross.mean()),
        **bounded("net_bps", net, timestamps[chosen], horizon),
        "break_even_fee_bps_per_order": float(gross.mean()) / 2,
        "share_of_trades_above_their_fees": float((net > 0).mean()),
    }
