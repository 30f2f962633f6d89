"""The training loop, from top to bottom. The data lies on the device, a batch is an index into it, and no step waits for either.

Between any two steps the loop can be put aside and gone on with later, in another process, as if it had not stopped: a
``Snapshot`` holds all that decides the steps to come. On a CPU the weights are then the same to the bit. On a GPU they are so to
tolerance only: cuDNN draws the dropout between the LSTM's layers from a state of its own that cannot be saved, and adds in no
fixed order.

On a GPU the LSTM computes in float16, not bfloat16: under autocast torch gives cuDNN's LSTM float16 whatever type it is told
(aten/src/ATen/cudnn/AutocastRNN.cpp), and a T4 has nothing else. Its smallest gradients would vanish, so the loss is scaled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crpbot_lib.training.config import TrainConfig
from crpbot_lib.training.dataset import Dataset, Floats, Ints
from crpbot_lib.training.errors import PermanentTrainingError
from crpbot_lib.training.model import PriceLSTM
from crpbot_lib.training.notices import Notices
from crpbot_lib.training.smoke import ModelLog

LOG_SECONDS = 10.0
_EVALUATION_BATCH = 4096
_DIVERGED = "Look at the features of this version (crpbot features verify), then lower the learning rate"


@dataclass(frozen=True)
class Progress:
    """How far one symbol's training is; ``epoch`` counts from 1 and is the one of the last ``step``."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    """Mean over the epoch so far."""
    eta_seconds: float
    """To the last step, at this process's pace."""
    validation_loss: float | None
    """At the end of an epoch and of the training: over every ``window_stride``-th validation window, so that overfitting is seen
    while it is paid for. Nothing is chosen by it."""


@dataclass(frozen=True)
class Snapshot:
    """The loop between two steps; the learning rate is constant, so there is no more to it.

    Tensors and lists are the loop's own: written, or copied, before the next step.
    """

    step: int
    """Optimiser steps done; epoch and place in it follow from the number of steps of an epoch."""
    seconds: float
    """Spent on them."""
    loss_sum: Tensor
    """Over the steps of the epoch in progress, or of the one just ended."""
    history: list[dict[str, float]]
    """Of each epoch that has ended: see ``Trained``."""
    weights: dict[str, Tensor]
    optimiser: dict[str, Any]
    loss_scale: dict[str, Any]
    """The gradient scaler's state; empty where nothing is scaled."""
    shuffle: Tensor
    """The shuffling generator's state before it drew the order of the epoch that the next step belongs to."""
    rng: Tensor
    cuda_rng: Tensor | None


@dataclass(frozen=True)
class Trained:
    """The weights after the last step (no epoch is picked by its validation score)."""

    weights: dict[str, Tensor]
    validation_logits: Floats
    """Per validation anchor."""
    test_logits: Floats
    """Per test anchor."""
    steps: int
    epochs: int
    train_loss: float
    """Mean over the last epoch."""
    history: list[dict[str, float]]
    """Per epoch ``epoch``, ``train_loss`` and ``validation_loss``; the last may have ended early."""
    seconds: float
    """Of all processes that had a part in it."""


def train(
    symbol: str,
    data: Dataset,
    config: TrainConfig,
    device: torch.device,
    log: ModelLog,
    report: Callable[[Progress], None],
    save: Callable[[Snapshot, int], object],
    notices: Notices,
    resume: Snapshot | None = None,
) -> Trained:
    """Trains one symbol with fixed seeds, from the beginning or from ``resume``.

    ``report`` is called at every epoch's end and every few seconds; ``save``, with the epoch, at every epoch's end and when
    ``notices`` want a checkpoint. Raises Interrupted at the next step when they say so, PermanentTrainingError when the loss is
    not a number.
    """
    torch.manual_seed(config.seed)
    shuffle = torch.Generator().manual_seed(config.seed)
    on_gpu = device.type == "cuda"
    half = on_gpu and config.mixed_precision
    # autocast would round each batch to float16: once is enough, and half as much to move
    windows = Windows(data, config.sequence, device, torch.float16 if half else torch.float32, config.batch_size)
    later = Windows(data, config.sequence, device)
    anchors = torch.from_numpy(data.train)
    network = PriceLSTM(data.values.shape[1], config).to(device)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=config.scaled_learning_rate, weight_decay=config.weight_decay, fused=on_gpu
    )
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    criterion = nn.BCEWithLogitsLoss()
    loss_sum = torch.zeros((), device=device)
    history: list[dict[str, float]] = []
    step, before = 0, 0.0
    if resume:
        network.load_state_dict(resume.weights)
        optimiser.load_state_dict(resume.optimiser)
        if resume.loss_scale:
            scaler.load_state_dict(resume.loss_scale)
        loss_sum.copy_(resume.loss_sum)
        step, before, history = resume.step, resume.seconds, resume.history
        shuffle.set_state(resume.shuffle)
        torch.set_rng_state(resume.rng)
        if resume.cuda_rng is not None and on_gpu:
            torch.cuda.set_rng_state(resume.cuda_rng, device)

    stride = min(config.window_stride, len(anchors))
    per_epoch = -(-(len(anchors) // stride) // config.batch_size)
    total = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
    first = step
    started = reported = time.monotonic()
    network.train()
    while step < total:
        done = step % per_epoch
        if not done:
            loss_sum.zero_()
        drawn_from = shuffle.get_state()
        order = _epoch_order(anchors, stride, shuffle, device)
        for batch in torch.split(order, config.batch_size)[done : done + total - step]:
            rows, labels = windows(batch)
            with torch.autocast(device.type, torch.float16, enabled=half):
                logits = network(rows)
            loss = criterion(logits.float(), labels)
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clip)
            scaler.step(optimiser)
            scaler.update()
            loss_sum += loss.detach()
            step += 1
            ended = step % per_epoch == 0
            last = ended or step == total
            keep = notices.wants_checkpoint() or last
            if keep or time.monotonic() - reported >= LOG_SECONDS:
                # the only place that waits for the device
                mean = _mean(symbol, loss_sum, step, per_epoch)
                _still_scaling(symbol, scaler, step)
                validation_loss = _validation_loss(symbol, network, later, data, stride, step) if last else None
                reported = time.monotonic()
                progress = Progress(
                    epoch=-(-step // per_epoch),
                    epochs=-(-total // per_epoch),
                    step=step,
                    steps=total,
                    loss=mean,
                    eta_seconds=(reported - started) / (step - first) * (total - step),
                    validation_loss=validation_loss,
                )
                _line(log, symbol, progress, before + reported - started)
                if validation_loss is not None:
                    history.append({"epoch": progress.epoch, "train_loss": mean, "validation_loss": validation_loss})
                report(progress)
            if keep:
                snapshot = Snapshot(
                    step=step,
                    seconds=before + reported - started,
                    loss_sum=loss_sum.cpu(),
                    history=history,
                    weights=network.state_dict(),
                    optimiser=optimiser.state_dict(),
                    loss_scale=scaler.state_dict(),
                    shuffle=shuffle.get_state() if ended else drawn_from,
                    rng=torch.get_rng_state(),
                    cuda_rng=torch.cuda.get_rng_state(device) if on_gpu else None,
                )
                save(snapshot, progress.epoch)
                # only here: whatever ends the training, this step is kept
                notices.check()

    validation, test = (_logits(network, later, part, notices.check) for part in (data.validation, data.test))
    if not (np.isfinite(validation).all() and np.isfinite(test).all()):
        raise PermanentTrainingError(f"{symbol}: the trained network gives NaN on later rows; the model diverged")
    return Trained(
        weights={name: tensor.detach().cpu() for name, tensor in network.state_dict().items()},
        validation_logits=validation,
        test_logits=test,
        steps=step,
        epochs=-(-step // per_epoch),
        train_loss=_mean(symbol, loss_sum, step, per_epoch),
        history=history,
        seconds=before + time.monotonic() - started,
    )


class Windows:
    """All windows of one symbol, on the device: a view of its rows that holds each row once, not ``sequence`` times.

    With ``batch``, for calls of at most so many anchors, nothing is allocated for a call, and the windows of one are overwritten by
    the next: on a CPU the pages of a new batch cost as much as the copy.
    """

    def __init__(
        self, data: Dataset, sequence: int, device: torch.device, dtype: torch.dtype = torch.float32, batch: int | None = None
    ) -> None:
        values = torch.from_numpy(data.values).to(dtype).to(device)
        self._labels = torch.from_numpy(data.labels).to(device)
        self._before = sequence - 1
        self._all = values.unfold(0, sequence, 1).transpose(1, 2)
        self._batch = None if batch is None else values.new_empty((batch, *self._all.shape[1:]))
        self.device = device

    def __call__(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Of the given anchors: windows (n, sequence, features) of the dtype, oldest row first, and float32 labels (n,)."""
        into = None if self._batch is None else self._batch[: len(anchors)]
        return torch.index_select(self._all, 0, anchors - self._before, out=into), self._labels.index_select(0, anchors)


def _epoch_order(anchors: Tensor, stride: int, shuffle: torch.Generator, device: torch.device) -> Tensor:
    """Every ``stride``-th anchor from a drawn offset on, shuffled; every epoch has as many."""
    offset = int(torch.randint(stride, (), generator=shuffle)) if stride > 1 else 0
    chosen = anchors[offset::stride][: len(anchors) // stride]
    order = chosen[torch.randperm(len(chosen), generator=shuffle)]
    return order.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else order


def _mean(symbol: str, loss_sum: Tensor, step: int, per_epoch: int) -> float:
    """The mean loss over the epoch of ``step``, up to it."""
    mean = loss_sum.item() / ((step - 1) % per_epoch + 1)
    if not np.isfinite(mean):
        raise PermanentTrainingError(
            f"{symbol}: the loss is {mean} in epoch {-(-step // per_epoch)}, step {step}: the training diverged. {_DIVERGED}"
        )
    return mean


def _validation_loss(symbol: str, network: PriceLSTM, windows: Windows, data: Dataset, stride: int, step: int) -> float:
    """Mean log loss over every ``stride``-th validation window; the network goes on training."""
    anchors = data.validation[::stride]
    # not to be interrupted: the epoch that has just ended has no checkpoint yet
    logits = _logits(network, windows, anchors, lambda: None).astype(np.float64)
    network.train()
    loss = float(np.mean(np.logaddexp(0.0, logits) - data.labels[anchors] * logits))
    if not np.isfinite(loss):
        raise PermanentTrainingError(
            f"{symbol}: the loss on the validation rows is {loss} after step {step}: the training diverged. {_DIVERGED}"
        )
    return loss


def _still_scaling(symbol: str, scaler: torch.amp.GradScaler, step: int) -> None:
    """A scale that has fallen below 1 means that hardly a step was taken: each one with a gradient beyond float16 is left out."""
    if scaler.is_enabled() and (scale := scaler.get_scale()) < 1:
        raise PermanentTrainingError(
            f"{symbol}: gradients are beyond float16 again and again, the loss scale is {scale:g} at step {step}: the training "
            f"diverged. {_DIVERGED} or train without mixed_precision"
        )


def _line(log: ModelLog, symbol: str, at: Progress, seconds: float) -> None:
    validation = "" if at.validation_loss is None else f", validation {at.validation_loss:.4f}"
    log.info(
        "%s: epoch %d/%d step %d/%d, loss %.4f%s, %.1f s, ETA %.0f s",
        symbol,
        at.epoch,
        at.epochs,
        at.step,
        at.steps,
        at.loss,
        validation,
        seconds,
        at.eta_seconds,
    )


def _logits(network: PriceLSTM, windows: Windows, anchors: Ints, check: Callable[[], None]) -> Floats:
    """In float32 on any device, as the model predicts later. ``check`` is called before each batch, and may raise."""
    network.eval()
    found: list[Tensor] = []
    with torch.inference_mode():
        for batch in torch.split(torch.from_numpy(anchors).to(windows.device), _EVALUATION_BATCH):
            check()
            found.append(network(windows(batch)[0]))
        logits: Floats = torch.cat(found).cpu().numpy()
    return logits
