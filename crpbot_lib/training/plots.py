"""The plots of one model's evaluation, as PNG. Drawn from what evaluation wrote, so at any time again."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, FAINT, MAIN, OTHER = "#24292f", "#818b98", "#0969da", "#bc4c00"
"""Colours on white; the report turns white to black where the reader's screen is dark, and leaves the hues."""
Drawing = Callable[[Axes, Mapping[str, Any], Mapping[str, Any]], None]


def render(name: str, title: str, metrics: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bytes | None:
    """The plot ``name`` of ``PLOTS`` as PNG; None where the evaluation has nothing to draw.

    ``title`` stands above, so the picture of a smoke model says so wherever it is shown.
    """
    if not PLOTS[name].drawn(evaluation):
        return None
    figure = Figure(figsize=(6.4, 3.6), dpi=130)
    figure.subplots_adjust(left=PLOTS[name].left, right=0.97, top=0.92, bottom=0.13)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=INK, size=8)
    axes.set_title(f"{title}: {PLOTS[name].title}", loc="left", color=INK, size=9)
    PLOTS[name].draw(axes, metrics, evaluation)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK, fontsize=7.5, loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _loss(axes: Axes, metrics: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
    history = evaluation["history"]
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row["train_loss"] for row in history], color=MAIN, marker="o", markersize=3, label="training")
    if told := [(row["epoch"], row["validation_loss"]) for row in history if row.get("validation_loss") is not None]:
        axes.plot(*zip(*told, strict=True), color=OTHER, marker="o", markersize=3, label="validation")
    base = metrics["validation_base_log_loss"]
    axes.axhline(base, color=FAINT, linestyle="--", linewidth=1, label="always the base rate (validation)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="log loss")


def _calibration(axes: Axes, metrics: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
    curve = evaluation["calibration"]
    said, came = [row["probability"] for row in curve], [row["share_up"] for row in curve]
    ends = (min(*said, *came), max(*said, *came))
    axes.plot(ends, ends, color=FAINT, linestyle="--", linewidth=1, label="perfect")
    known = [row for row in curve if row["share_up_low"] is not None]
    for row in known:
        axes.vlines(row["probability"], row["share_up_low"], row["share_up_high"], color=MAIN, linewidth=1.2, alpha=0.5)
    interval = f", {100 * metrics['level']:g} % interval" if known else ""
    axes.plot(said, came, "o", color=MAIN, markersize=4.5, label=f"as said{interval}")
    if metrics["temperature"] is not None:
        scaled = [row["calibrated"] for row in curve]
        label = f"at temperature {metrics['temperature']:.2f}"
        axes.plot(scaled, came, "o", markerfacecolor="none", color=OTHER, markersize=4.5, label=label)
    axes.set(xlabel="probability of UP said", ylabel="share of UP that came")


def _rolling(axes: Axes, metrics: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
    points = evaluation["rolling_accuracy"]["points"]
    ends = np.array([point["end"].removesuffix("Z") for point in points], dtype="datetime64[s]")
    low, high = (np.array([point[bound] for point in points], dtype=float) for bound in ("accuracy_low", "accuracy_high"))
    if not np.isnan(low).all():
        axes.fill_between(ends, low, high, color=MAIN, alpha=0.2, linewidth=0, label=f"{100 * metrics['level']:g} % interval")
    axes.plot(ends, [point["accuracy"] for point in points], color=MAIN, linewidth=1.4, label="accuracy")
    axes.axhline(metrics["majority_accuracy"], color=FAINT, linestyle="--", linewidth=1, label="the commoner side, always")
    locator = AutoDateLocator(minticks=3, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.xaxis.get_offset_text().set(color=INK, size=8)
    hours = evaluation["rolling_accuracy"]["minutes"] / 60
    axes.set(xlabel="end of the window (UTC)", ylabel=f"accuracy over {hours:.0f} h")


def _importance(axes: Axes, metrics: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
    groups = evaluation["importance"]["groups"]
    for place, of in enumerate(groups):
        lost = 100 * of["accuracy_lost"]
        if of["accuracy_lost_low"] is not None:
            axes.hlines(place, 100 * of["accuracy_lost_low"], 100 * of["accuracy_lost_high"], color=MAIN, linewidth=2, alpha=0.5)
        axes.plot(lost, place, "o", color=MAIN, markersize=6)
    axes.axvline(0, color=FAINT, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(groups)), [f"{of['group']} ({of['features']})" for of in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set(xlabel=f"points of accuracy lost without it, {100 * metrics['level']:g} % interval")


@dataclass(frozen=True)
class Plot:
    title: str
    part: str
    """The key of the evaluation that it draws."""
    draw: Drawing
    left: float = 0.1
    """Where its axes begin, as a share of the width."""

    def drawn(self, evaluation: Mapping[str, Any]) -> bool:
        return bool(evaluation.get(self.part))


PLOTS: Mapping[str, Plot] = {
    "loss": Plot("loss by epoch", "history", _loss),
    "calibration": Plot("calibration on the test rows", "calibration", _calibration),
    "rolling_accuracy": Plot("accuracy over time on the test rows", "rolling_accuracy", _rolling),
    "importance": Plot("feature groups, each shuffled in time", "importance", _importance, left=0.24),
}
