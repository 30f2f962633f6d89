"""The training loop, from top to bottom. The data lies on the device; a batch is an index, never a copy per sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from crpbot_lib.training.config import TrainConfig
from crpbot_lib.training.dataset import Dataset, Floats
from crpbot_lib.training.errors import PermanentTrainingError
from crpbot_lib.training.model import PriceLSTM
from crpbot_lib.training.smoke import ModelLog

LOG_SECONDS = 10.0
_EVALUATION_BATCH = 4096
Progress = Callable[[int, int], None]
"""Called now and then with (steps done, steps in all)."""


@dataclass(frozen=True)
class Trained:
    """The weights after the last step (no epoch is picked by its validation score, so validation stays untouched)."""

    weights: dict[str, Tensor]
    validation: Floats
    """Probability of UP per validation anchor."""
    steps: int
    epochs: int
    train_loss: float
    """Mean over the last epoch."""
    seconds: float


def train(symbol: str, data: Dataset, config: TrainConfig, device: torch.device, log: ModelLog, progress: Progress) -> Trained:
    """Trains one symbol with fixed seeds. PermanentTrainingError when the loss is not a number."""
    started = time.monotonic()
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

    per_epoch = -(-len(anchors) // config.batch_size)
    total = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
    step = epoch = 0
    loss_sum = torch.zeros((), device=device)
    mean_loss = float("nan")
    logged = started
    network.train()
    while step < total:
        epoch += 1
        steps_before = step
        loss_sum.zero_()
        order = anchors[torch.randperm(len(anchors), generator=shuffle)].to(device)
        for batch in torch.split(order, config.batch_size):
            windows = values[batch[:, None] + offsets]
            loss = criterion(network(windows), labels[batch])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clip)
            optimiser.step()
            loss_sum += loss.detach()
            step += 1
            now = time.monotonic()
            if now - logged >= LOG_SECONDS or step == total:
                # the only places that wait for the device: here and at the epoch's end
                logged = now
                mean_loss = _checked(symbol, loss_sum, step - steps_before, epoch, step)
                _line(log, symbol, config, epoch, step, total, mean_loss, now - started)
                progress(step, total)
            if step == total:
                break
        mean_loss = _checked(symbol, loss_sum, step - steps_before, epoch, step)
        if step < total:
            _line(log, symbol, config, epoch, step, total, mean_loss, time.monotonic() - started)
            progress(step, total)

    probability = np.concatenate(list(_predict(network, values, data, offsets)))
    if not np.isfinite(probability).all():
        raise PermanentTrainingError(f"{symbol}: the trained network gives NaN on validation rows; the model diverged")
    return Trained(
        weights={name: tensor.detach().cpu() for name, tensor in network.state_dict().items()},
        validation=probability,
        steps=step,
        epochs=epoch,
        train_loss=mean_loss,
        seconds=time.monotonic() - started,
    )


def _checked(symbol: str, loss_sum: Tensor, steps: int, epoch: int, step: int) -> float:
    mean = loss_sum.item() / steps
    if not np.isfinite(mean):
        raise PermanentTrainingError(
            f"{symbol}: the loss is {mean} in epoch {epoch}, step {step}: the training diverged. "
            "Look at the features of this version (crpbot features verify), then lower the learning rate"
        )
    return mean


def _line(log: ModelLog, symbol: str, config: TrainConfig, epoch: int, step: int, total: int, loss: float, seconds: float) -> None:
    log.info(
        "%s: epoch %d/%d step %d/%d, loss %.4f, %.1f s, ETA %.0f s",
        symbol,
        epoch,
        config.epochs,
        step,
        total,
        loss,
        seconds,
        seconds / step * (total - step),
    )


def _predict(network: PriceLSTM, values: Tensor, data: Dataset, offsets: Tensor) -> Iterator[Floats]:
    network.eval()
    with torch.inference_mode():
        for batch in torch.split(torch.from_numpy(data.validation).to(values.device), _EVALUATION_BATCH):
            yield torch.sigmoid(network(values[batch[:, None] + offsets])).cpu().numpy()
