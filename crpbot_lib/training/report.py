"""One page about a run, ``training-runs/<run>/report.html``, and its plots as PNG beside each model. Made of what the lake holds of
the run, so it can be made again at any time; it needs nothing from outside."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from crpbot_lib.lake import KeyMissingError, Lake, keys
from crpbot_lib.training import plots
from crpbot_lib.training.config import JobSpec
from crpbot_lib.training.smoke import ModelLog, marked

logger = logging.getLogger(__name__)


def write_report(lake: Lake, spec: JobSpec) -> list[str]:
    """Writes plots and page of the run's finished models; returns the keys of what was written, the page's first. None where no
    model is finished."""
    models = [model for symbol in spec.symbols if (model := _model(lake, spec, symbol))]
    if not models:
        return []
    page = _ENVIRONMENT.get_template("report.html.j2").render(job=spec, models=models, mark=marked("", spec.smoke))
    key = keys.training_run(spec.run, "report.html")
    lake.write(key, page.encode())
    ModelLog(logger, spec.smoke).info("run %s: report of %d models at %s", spec.run, len(models), lake.url(key))
    return [key, *(plot["key"] for model in models for plot in model["plots"])]


def _model(lake: Lake, spec: JobSpec, symbol: str) -> dict[str, Any] | None:
    try:
        metrics, evaluation = (lake.read_json(keys.run_symbol(spec.run, symbol, f"{n}.json")) for n in ("metrics", "evaluation"))
    except KeyMissingError:
        return None
    title = marked(f"{symbol}, SYNTHETIC data" if spec.synthetic else symbol, spec.smoke)
    drawn = []
    for name, plot in plots.PLOTS.items():
        if png := plots.render(name, title, metrics, evaluation):
            lake.write(key := keys.run_symbol(spec.run, symbol, f"{name}.png"), png)
            drawn.append({"key": key, "title": plot.title, "source": f"data:image/png;base64,{base64.b64encode(png).decode()}"})
    return {
        "symbol": symbol,
        "metrics": metrics,
        "evaluation": evaluation,
        "plots": drawn,
        "facts": _facts(metrics),
        "notes": _notes(metrics),
    }


def _facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    windows = {part: f"{metrics[f'{part}_windows']:,} windows" for part in ("train", "validation", "test")}
    temperature = metrics["temperature"]
    fitted = "none" if temperature is None else f"{temperature:.2f} (log loss then {metrics['calibrated_log_loss']:.4f})"
    trained = f"{metrics['seconds']:.0f} s, {metrics['steps']:,} steps, until {metrics['trained_at'][:16].replace('T', ' ')} UTC"
    return {**windows, "temperature": fitted, "GPU": metrics["gpu"] or "none", "trained for": trained}


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    """Why a figure or its interval is absent, each reason once."""
    why: dict[str, list[str]] = {}
    for name, note in metrics.items():
        if name.endswith("_note") and note:
            why.setdefault(note, []).append(name.removesuffix("_note").replace("_", " "))
    return [f"{', '.join(names)}: {note}" for note, names in why.items()]


def _percent(value: float | None, digits: int = 1) -> str:
    return "none" if value is None else f"{100 * value:.{digits}f} %"


def _points(value: float | None, digits: int = 1) -> str:
    return "none" if value is None else f"{100 * value:z.{digits}f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "none" if value is None else f"{value:z.{digits}f}"


_FORMATS = {"percent": _percent, "points": _points, "number": _number}


def _bounds(of: Mapping[str, Any], name: str, kind: str = "percent", digits: int | None = None) -> str:
    """The interval of ``name``, or that there is none."""
    ends = [of[f"{name}_low"], of[f"{name}_high"]]
    if None in ends:
        return "no interval"
    shown = _FORMATS[kind]
    return " to ".join(shown(end) if digits is None else shown(end, digits) for end in ends)


_ENVIRONMENT = Environment(
    loader=PackageLoader("crpbot_lib.training", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
_ENVIRONMENT.filters |= {**_FORMATS, "bounds": _bounds}
