"""Training a model: how fast the windows come, whether a step is the step it should be, and what a model costs on a GPU.

* Loader: windows a second of one process on one CPU thread, ours (a view, indexed by the batch; float32 as on a CPU, float16 as on
  a GPU) against a ``Dataset`` of one sample and a ``DataLoader``, as it is commonly written (``torch.tensor`` of the sample) and as
  fast as it gets (no copy before the batch). The processes take turns; the seconds are the process's own, which a busy machine
  distorts least.
* Step: loss and gradients of one step of the trainer against the plain way of writing it, float32 on the device at hand; the plain
  way is a loop over samples. On a GPU also what float16 changes.
* Model, on a GPU alone: samples a second, and seconds and dollars of a whole training (without the report's figures), from some of
  its epochs; the plain loop (``DataLoader``, batch 32, float32) beside it in the same process, scaled from some of its first epoch;
  and the log loss of both after as many samples, fewer of them.
* ``--strides 1 5 15``, instead of all that: what training on every so many-th window does to the log loss of later rows. A small
  network on a CPU, the same number of epochs for each, several seeds; with ``--features`` on real markets.

The data is SYNTHETIC (random rows, labels that follow from them with noise), or the newest rows of ``--features``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as SampleDataset

from benchmarks.common import Row, machine, show, worker
from crpbot_lib.features.catalog import EXCLUDED
from crpbot_lib.training import TrainConfig, dataset
from crpbot_lib.training.dataset import Dataset, Floats
from crpbot_lib.training.model import PriceLSTM
from crpbot_lib.training.notices import Notices
from crpbot_lib.training.smoke import ModelLog
from crpbot_lib.training.trainer import Progress, Snapshot, Trained, Windows, train

FEATURES = 73
PLAIN_BATCH = 32
OURS = {"ours, float16": torch.float16, "ours, float32": torch.float32}
COMMON = "DataLoader, common"
LOADERS = {**dict.fromkeys(OURS, 1024), COMMON: PLAIN_BATCH, "DataLoader, fastest": PLAIN_BATCH}
"""Name and batch."""
ROUND_SECONDS = 2.0
TOLERANCE = 1e-4
"""Of the largest gradient, and of the loss."""
LOG = ModelLog(logging.getLogger(__name__), smoke=True)


def synthetic(windows: int, config: TrainConfig, seed: int = 6) -> Dataset:
    """A symbol with about so many training windows. Each label follows from the means of five features over the last ten rows,
    and from noise of the same size."""
    rows = _rows(windows, config)
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, FEATURES), dtype=np.float32)
    means = np.lib.stride_tricks.sliding_window_view(values[:, :5].sum(axis=1), 10).mean(axis=1)
    moves = np.concatenate([np.zeros(9), means / means.std() + rng.normal(size=len(means))])
    minutes = pl.datetime_range(pl.datetime(2024, 1, 1), pl.datetime(2024, 1, 1) + pl.duration(minutes=rows - 1), "1m", eager=True)
    # a close that is as much above or below the one a horizon before it as the move of that row says
    close = 100 * np.exp(1e-4 * _carried(moves, config.horizon))
    names = [f"f{i}" for i in range(FEATURES)]
    frame = pl.DataFrame({"timestamp": minutes.dt.replace_time_zone("UTC"), "close": close}).hstack(pl.DataFrame(values, names))
    return dataset.build("SYNTHETIC", frame, tuple(names), config, [])


def _carried(moves: np.ndarray[Any, np.dtype[np.float64]], horizon: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``path`` with ``path[i + horizon] - path[i] == moves[i]``."""
    path = np.zeros(len(moves) + horizon)
    for start in range(horizon):
        steps = moves[start::horizon]
        path[start + horizon :: horizon][: len(steps)] = np.cumsum(steps)
    return path[: len(moves)]


def from_file(path: Path, windows: int | None, config: TrainConfig) -> Dataset:
    """The newest rows of a features file, about ``windows`` training windows (None: all)."""
    frame = pl.read_parquet(path)
    names = tuple(c for c in frame.columns if c not in EXCLUDED)
    return dataset.build(path.stem, frame if windows is None else frame.tail(_rows(windows, config)), names, config, [])


def _rows(windows: int, config: TrainConfig) -> int:
    """How many rows have about so many training windows."""
    return int(windows / (1 - config.validation_fraction - config.test_fraction)) + 3 * (config.sequence + config.horizon)


class Samples(SampleDataset[tuple[Tensor, Tensor]]):
    """The plain way: one window a call. ``copied``: as it is commonly written, a new tensor of every sample."""

    def __init__(self, data: Dataset, sequence: int, copied: bool = False) -> None:
        self.values, self.labels = data.values, data.labels
        self.anchors, self.sequence, self.copied = data.train, sequence, copied

    def __len__(self) -> int:
        return len(self.anchors)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        last = int(self.anchors[index])
        rows = self.values[last - self.sequence + 1 : last + 1]
        if self.copied:
            return torch.tensor(rows, dtype=torch.float32), torch.tensor(self.labels[last], dtype=torch.float32)
        return torch.from_numpy(rows), torch.from_numpy(self.labels[last : last + 1])[0]


# --- the loader ---------------------------------------------------------------------------------------------------------------


def batches(name: str, data: Dataset, sequence: int) -> Iterator[Tensor]:
    """Shuffled batches of windows, epoch after epoch."""
    if name in OURS:
        windows, anchors = Windows(data, sequence, torch.device("cpu"), OURS[name], LOADERS[name]), torch.from_numpy(data.train)
        while True:
            for batch in torch.split(anchors[torch.randperm(len(anchors))], LOADERS[name]):
                yield windows(batch)[0]
    while True:
        samples = Samples(data, sequence, copied=name == COMMON)
        for rows, _ in DataLoader(samples, batch_size=LOADERS[name], shuffle=True):
            yield rows


def load(name: str, windows: int) -> None:
    """One process's work: for each line that it reads, windows a second over a round."""
    torch.set_num_threads(1)
    config = TrainConfig()
    source = batches(name, synthetic(windows, config), config.sequence)
    next(source)
    for _ in sys.stdin:
        seen, began, cpu = 0, time.perf_counter(), time.process_time()
        while time.process_time() - cpu < ROUND_SECONDS:
            seen += len(next(source))
        row = {"windows/cpu s": seen / (time.process_time() - cpu), "windows/s": seen / (time.perf_counter() - began)}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def race_loaders(rounds: int, windows: int) -> list[Row]:
    processes = {name: worker("benchmarks.training", f"--loader={name}", f"--loader-windows={windows}", env={}) for name in LOADERS}
    runs: dict[str, list[Row]] = {name: [] for name in LOADERS}
    for _ in range(rounds):
        for name, process in processes.items():
            runs[name].append(_ask(process))
    for process in processes.values():
        process.communicate()
    rows = []
    for name, each in runs.items():
        ratios = [one["windows/cpu s"] / common["windows/cpu s"] for one, common in zip(each, runs[COMMON], strict=True)]
        medians = {unit: statistics.median(one[unit] for one in each) for unit in each[0]}
        rows.append({"loader": name, "batch": LOADERS[name], **medians, "x common": statistics.median(ratios)})
    return rows


def _ask(process: subprocess.Popen[bytes]) -> Row:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a loader ended with {process.wait()}")
    row: Row = json.loads(line)
    return row


# --- the step -----------------------------------------------------------------------------------------------------------------


def compare_step(device: torch.device, config: TrainConfig, windows: int = 64) -> list[Row]:
    """One step over few windows: how far loss and gradients are from the plain way's, as a share of the largest. SystemExit where
    float32 is further away than TOLERANCE."""
    config = config.model_copy(
        update={"epochs": 1, "batch_size": windows, "dropout": 0.0, "gradient_clip": 1e9, "window_stride": 1, "max_steps": 1}
    )
    data = synthetic(1000, config)
    data = replace(data, train=data.train[:windows])
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(config.seed)
    plain = PriceLSTM(FEATURES, config).to(device)
    for rows, label in (samples := Samples(data, config.sequence)):
        logit = plain(rows[None].to(device))[0]
        (nn.functional.binary_cross_entropy_with_logits(logit, label.to(device)) / len(samples)).backward()
    gradients = torch.cat([p.grad.flatten().cpu() for p in plain.parameters() if p.grad is not None])
    rows_of: list[Row] = []
    for mixed in (False, True) if device.type == "cuda" else (False,):
        kept: list[Snapshot] = []
        run(data, config.model_copy(update={"mixed_precision": mixed}), device, save=lambda s, _, kept=kept: kept.append(s))
        # Adam's first moment after one step is a tenth of the gradient
        ours = torch.cat([state["exp_avg"].flatten().cpu() / 0.1 for _, state in sorted(kept[0].optimiser["state"].items())])
        apart = float((ours - gradients).abs().max() / gradients.abs().max())
        rows_of.append(
            {
                "step": f"{device.type}, {'float16' if mixed else 'float32'}",
                "windows": len(samples),
                "gradients": len(gradients),
                "apart, of the largest": apart,
                "cosine": float(torch.cosine_similarity(ours.double(), gradients.double(), dim=0)),
            }
        )
        if not mixed and not apart <= TOLERANCE:
            raise SystemExit(
                f"our step is not the plain way's: gradients differ by {apart:.1e} of the largest, at most {TOLERANCE:g}"
            )
    torch.backends.cudnn.allow_tf32 = tf32
    return rows_of


# --- the model ----------------------------------------------------------------------------------------------------------------


def run(
    data: Dataset,
    config: TrainConfig,
    device: torch.device,
    report: Callable[[Progress], None] = lambda _: None,
    save: Callable[[Snapshot, int], None] = lambda *_: None,
) -> Trained:
    return train("bench", data, config, device, LOG, report, save, Notices())


def plain_loop(data: Dataset, config: TrainConfig, device: torch.device, seconds: float) -> tuple[PriceLSTM, int, float]:
    """The plain loop, for ``config.epochs`` or so many seconds: network, samples seen, seconds. Each step waits for its loss."""
    torch.manual_seed(config.seed)
    network = PriceLSTM(data.values.shape[1], config).to(device)
    rate = config.model_copy(update={"batch_size": PLAIN_BATCH}).scaled_learning_rate
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=config.weight_decay)
    criterion, total, seen = nn.BCEWithLogitsLoss(), 0.0, 0
    network.train()
    began = time.perf_counter()
    for _ in range(config.epochs):
        for rows, labels in DataLoader(Samples(data, config.sequence), batch_size=PLAIN_BATCH, shuffle=True):
            loss = criterion(network(rows.to(device)), labels.to(device))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clip)
            optimiser.step()
            total += loss.item()
            seen += len(rows)
            if time.perf_counter() - began >= seconds:
                return network, seen, time.perf_counter() - began
    return network, seen, time.perf_counter() - began


def pace(data: Dataset, config: TrainConfig, device: torch.device, epochs: int) -> tuple[float, float]:
    """Ours: the seconds of an epoch with its validation, the median of all but the first, and the seconds of a training of so many
    epochs besides them: upload, what the first epoch took longer, the logits on later rows."""
    ends: list[float] = []
    began = time.perf_counter()

    def report(progress: Progress) -> None:
        if progress.validation_loss is not None:
            ends.append(time.perf_counter())

    run(data, config.model_copy(update={"epochs": epochs}), device, report)
    ended = time.perf_counter()
    epoch = statistics.median(after - before for before, after in itertools.pairwise(ends))
    return epoch, (ended - began) - epochs * epoch


def log_loss(logits: Floats, labels: Floats) -> float:
    wide = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, wide) - labels * wide))


def measure_model(options: argparse.Namespace, device: torch.device, config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """What a model takes, and how good it is, ours beside the plain loop."""
    source: Callable[[int, TrainConfig], Dataset] = synthetic
    if options.features:
        source = lambda windows, settings: from_file(options.features, windows, settings)  # noqa: E731

    data = source(options.windows, config)
    speed: list[Row] = []

    def row(name: str, epoch: float, windows: int, besides: float) -> None:
        seconds = config.epochs * epoch + besides
        dollars = seconds / 3600 * options.usd_per_hour
        speed.append(
            {"loop": name, "samples/s": windows / epoch, "windows an epoch": windows, "model s": seconds, "model $": dollars}
        )

    for batch in options.batches:
        for stride in dict.fromkeys((config.window_stride, 1)):
            one = config.model_copy(update={"batch_size": batch, "window_stride": stride})
            epoch, besides = pace(data, one, device, options.timed_epochs)
            row(f"ours, batch {batch}, stride {stride}", epoch, len(data.train) // stride, besides)
    _, seen, seconds = plain_loop(data, config, device, options.plain_seconds)
    row(f"DataLoader, batch {PLAIN_BATCH}, {seen:,} samples scaled", seconds / seen * len(data.train), len(data.train), 0.0)
    plain = speed[-1]["model s"]
    for one_row in speed:
        one_row["x"] = plain / one_row["model s"]

    few = source(options.quality_windows, config)
    truth = few.labels[few.validation]
    base = float(few.labels[few.train].mean())
    quality: list[Row] = []

    def judged(name: str, logits: Floats, seconds: float, seen: int) -> None:
        found = {"loop": name, "samples": seen, "seconds": seconds, "validation log loss": log_loss(logits, truth)}
        always = np.full(len(truth), np.log(base / (1 - base)), dtype=np.float32)
        quality.append({**found, "always the base rate": log_loss(always, truth), "validation windows": len(truth)})

    epochs = config.model_copy(update={"epochs": options.quality_epochs})
    for stride in dict.fromkeys((1, config.window_stride)):
        # the same number of windows seen, whatever the stride
        one = epochs.model_copy(update={"window_stride": stride, "epochs": epochs.epochs * stride})
        trained = run(few, one, device)
        seen = one.epochs * (len(few.train) // stride)
        judged(
            f"ours, batch {one.batch_size}, stride {stride}, {one.epochs} epochs", trained.validation_logits, trained.seconds, seen
        )
    network, seen, seconds = plain_loop(few, epochs, device, options.plain_seconds)
    windows = Windows(few, config.sequence, device)
    with torch.inference_mode():
        parts = torch.split(torch.from_numpy(few.validation).to(device), 4096)
        logits: Floats = torch.cat([network.eval()(windows(part)[0]) for part in parts]).cpu().numpy()
    judged(f"DataLoader, batch {PLAIN_BATCH}, {seen / len(few.train):.2f} epochs", logits, seconds, seen)
    return speed, quality


def compare_strides(data: Dataset, strides: list[int], seeds: int) -> list[Row]:
    """Log loss on validation and test for each stride: the mean over the seeds, and how far apart the seeds are."""
    torch.set_num_threads(1)
    small = TrainConfig(layers=1, hidden=16, dropout=0.2, epochs=5, batch_size=256)
    base = float(data.labels[data.train].mean())
    parts = {"validation": data.labels[data.validation], "test": data.labels[data.test]}
    always = {name: log_loss(np.full(len(y), np.log(base / (1 - base)), dtype=np.float32), y) for name, y in parts.items()}
    rows: list[Row] = [{"stride": "always the base rate", "steps": 0, "cpu s": 0.0}]
    for name in parts:
        rows[0] |= {name: always[name], f"{name}, seeds": 0.0}
    for stride in strides:
        began, trained = time.process_time(), []
        for seed in range(seeds):
            trained.append(run(data, small.model_copy(update={"window_stride": stride, "seed": seed}), torch.device("cpu")))
        row: Row = {"stride": str(stride), "steps": trained[0].steps, "cpu s": (time.process_time() - began) / seeds}
        for name, y in parts.items():
            losses = [log_loss(t.validation_logits if name == "validation" else t.test_logits, y) for t in trained]
            row |= {name: statistics.mean(losses), f"{name}, seeds": max(losses) - min(losses)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="of the loaders")
    add("--loader-windows", type=int, default=150_000)
    add("--features", type=Path, help="a features file instead of SYNTHETIC data, for the model")
    add("--windows", type=int, default=735_000, help="that a whole model trains on")
    add("--timed-epochs", type=int, default=4, help="of ours, at least 2, for each batch and stride")
    add("--batches", type=int, nargs="+", default=[1024, 4096])
    add("--plain-seconds", type=float, default=60.0, help="at most, of the plain loop, each of the two times")
    add("--quality-windows", type=int, default=30_000)
    add("--quality-epochs", type=int, default=2)
    add("--usd-per-hour", type=float, default=0.30, help="of the machine; the default is a g5.xlarge's spot price")
    add("--cpu-trial", action="store_true", help="the model's part on a CPU, with a tiny network: only to see that it works")
    add("--strides", type=int, nargs="+", help="only compare these strides between windows")
    add("--seeds", type=int, default=2, help="for each stride")
    add("--json", action="store_true")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--loader", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        load(options.loader, options.loader_windows)
        return

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    gpu = torch.cuda.get_device_name(device) if on_gpu else "no GPU"
    config = TrainConfig()
    small = config if on_gpu else config.model_copy(update={"hidden": 16, "layers": 2})
    kind = options.features.stem if options.features else "SYNTHETIC"
    if options.strides:
        data = from_file(options.features, None, config) if options.features else synthetic(options.quality_windows, config)
        title = f"training: strides, {kind}, {len(data.train):,} training windows, 1 x 16, 5 epochs, {options.seeds} seeds"
        _tell({title: compare_strides(data, options.strides, options.seeds)}, gpu, options.json)
        return
    tables = {
        f"training: loader, {TrainConfig().sequence} x {FEATURES} SYNTHETIC, one thread, median of {options.rounds}": race_loaders(
            options.rounds, options.loader_windows
        ),
        f"training: one step against the plain way, {config.layers} x {config.hidden}, SYNTHETIC": compare_step(device, config),
    }
    if on_gpu or options.cpu_trial:
        trial = "" if on_gpu else ", TRIAL of a tiny network on a CPU"
        speed, quality = measure_model(options, device, config if on_gpu else small)
        title = f"{kind}, {gpu}, torch {torch.__version__}{trial}"
        tables[f"training: a model, {config.epochs} epochs of {options.windows:,} windows, {title}"] = speed
        tables[f"training: quality, {title}"] = quality
    _tell(tables, gpu, options.json)
    if not (on_gpu or options.cpu_trial or options.json):
        sys.stdout.write("no GPU: seconds and dollars of a model are not measured\n")


def _tell(tables: dict[str, list[Row]], gpu: str, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"benchmark": "training", "machine": machine(), "gpu": gpu, "tables": tables}) + "\n")
        return
    for title, rows in tables.items():
        show(title, rows, False)


if __name__ == "__main__":
    main()
