"""The training loop, from top to bottom. The data lies on the device; a batch is an index, never a copy per sample.

Between any two steps the loop can be put aside and gone on with later, in another process, as if it had not stopped: a
``Snapshot`` holds all that decides the steps to come. On a CPU the weights are then the same to the bit. On a GPU they are so to
tolerance only: cuDNN draws the dropout between the LSTM's layers from a state of its own that cannot be saved, and adds in no
fixed order.
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


@dataclass(frozen=True)
class Snapshot:
    """The loop between two steps; the learning rate is constant and nothing is scaled, so there is no more to it.

    The tensors are the loop's own: written, or copied, before the next step.
    """

    step: int
    """Optimiser steps done; epoch and place in it follow from the number of steps of an epoch."""
    seconds: float
    """Spent on them."""
    loss_sum: Tensor
    """Over the steps of the epoch in progress, or of the one just ended."""
    weights: dict[str, Tensor]
    optimiser: dict[str, Any]
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
    values = torch.from_numpy(data.values).to(device)
    labels = torch.from_numpy(data.labels).to(device)
    anchors = torch.from_numpy(data.train)
    offsets = torch.arange(1 - config.sequence, 1, device=device)
    network = PriceLSTM(values.shape[1], config).to(device)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=device.type == "cuda"
    )
    criterion = nn.BCEWithLogitsLoss()
    loss_sum = torch.zeros((), device=device)
    step, before = 0, 0.0
    if resume:
        network.load_state_dict(resume.weights)
        optimiser.load_state_dict(resume.optimiser)
        loss_sum.copy_(resume.loss_sum)
        step, before = resume.step, resume.seconds
        shuffle.set_state(resume.shuffle)
        torch.set_rng_state(resume.rng)
        if resume.cuda_rng is not None and device.type == "cuda":
            torch.cuda.set_rng_state(resume.cuda_rng, device)

    per_epoch = -(-len(anchors) // config.batch_size)
    total = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
    first = step
    started = reported = time.monotonic()
    network.train()
    while step < total:
        done = step % per_epoch
        if not done:
            loss_sum.zero_()
        drawn_from = shuffle.get_state()
        order = anchors[torch.randperm(len(anchors), generator=shuffle)].to(device)
        for batch in torch.split(order, config.batch_size)[done : done + total - step]:
            windows = values[batch[:, None] + offsets]
            loss = criterion(network(windows), labels[batch])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clip)
            optimiser.step()
            loss_sum += loss.detach()
            step += 1
            now = time.monotonic()
            ended = step % per_epoch == 0
            keep = notices.wants_checkpoint() or ended or step == total
            if keep or now - reported >= LOG_SECONDS:
                # the only place that waits for the device
                reported = now
                progress = Progress(
                    epoch=-(-step // per_epoch),
                    epochs=-(-total // per_epoch),
                    step=step,
                    steps=total,
                    loss=_mean(symbol, loss_sum, step, per_epoch),
                    eta_seconds=(now - started) / (step - first) * (total - step),
                )
                _line(log, symbol, progress, before + now - started)
                report(progress)
            if keep:
                snapshot = Snapshot(
                    step=step,
                    seconds=before + now - started,
                    loss_sum=loss_sum.cpu(),
                    weights=network.state_dict(),
                    optimiser=optimiser.state_dict(),
                    shuffle=shuffle.get_state() if ended else drawn_from,
                    rng=torch.get_rng_state(),
                    cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                )
                save(snapshot, progress.epoch)
                # only here: whatever ends the training, this step is kept
                notices.check()

    validation, test = (_logits(network, values, side, offsets, notices) for side in (data.validation, data.test))
    if not (np.isfinite(validation).all() and np.isfinite(test).all()):
        raise PermanentTrainingError(f"{symbol}: the trained network gives NaN on later rows; the model diverged")
    return Trained(
        weights={name: tensor.detach().cpu() for name, tensor in network.state_dict().items()},
        validation_logits=validation,
        test_logits=test,
        steps=step,
        epochs=-(-step // per_epoch),
        train_loss=_mean(symbol, loss_sum, step, per_epoch),
        seconds=before + time.monotonic() - started,
    )


def _mean(symbol: str, loss_sum: Tensor, step: int, per_epoch: int) -> float:
    """The mean loss over the epoch of ``step``, up to it."""
    mean = loss_sum.item() / ((step - 1) % per_epoch + 1)
    if not np.isfinite(mean):
        raise PermanentTrainingError(
            f"{symbol}: the loss is {mean} in epoch {-(-step // per_epoch)}, step {step}: the training diverged. "
            "Look at the features of this version (crpbot features verify), then lower the learning rate"
        )
    return mean


def _line(log: ModelLog, symbol: str, at: Progress, seconds: float) -> None:
    log.info(
        "%s: epoch %d/%d step %d/%d, loss %.4f, %.1f s, ETA %.0f s",
        symbol,
        at.epoch,
        at.epochs,
        at.step,
        at.steps,
        at.loss,
        seconds,
        at.eta_seconds,
    )


def _logits(network: PriceLSTM, values: Tensor, anchors: Ints, offsets: Tensor, notices: Notices) -> Floats:
    network.eval()
    found: list[Tensor] = []
    with torch.inference_mode():
        for batch in torch.split(torch.from_numpy(anchors).to(values.device), _EVALUATION_BATCH):
            notices.check()
            found.append(network(values[batch[:, None] + offsets]))
        logits: Floats = torch.cat(found).cpu().numpy()
    return logits
