"""What one step is, held against the plain way of writing it; and which windows an epoch takes. The data is synthetic."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

from crpbot_lib.training import PermanentTrainingError, TrainConfig, trainer
from crpbot_lib.training.config import LEARNING_RATE_BATCH
from crpbot_lib.training.dataset import Dataset, Scaler
from crpbot_lib.training.model import PriceLSTM
from crpbot_lib.training.notices import Notices
from crpbot_lib.training.smoke import ModelLog
from crpbot_lib.training.trainer import Progress, Snapshot, Windows, train

CPU = torch.device("cpu")
CONFIG = TrainConfig(sequence=12, layers=2, hidden=8, dropout=0, epochs=1, batch_size=512, gradient_clip=1e9, window_stride=1)


@pytest.fixture(scope="module")
def data() -> Dataset:
    """A small symbol with 300 training windows of five features."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=(500, 5)).astype(np.float32)
    anchors = np.arange(11, 490)
    return Dataset(
        values=values,
        labels=(values.sum(axis=1) > 0).astype(np.float32),
        timestamps=np.arange(500) * 60_000_000,
        close=np.ones(500),
        train=anchors[:300],
        validation=anchors[350:400],
        test=anchors[420:],
        tradable=anchors[420:],
        scaler=Scaler(np.zeros(5, np.float32), np.ones(5, np.float32), 10.0),
        counts={},
        split="later",
        test_split="last",
    )


def run(data: Dataset, config: TrainConfig) -> tuple[trainer.Trained, list[Snapshot], list[Progress]]:
    kept: list[Snapshot] = []
    reports: list[Progress] = []
    log = ModelLog(logging.getLogger("test"), smoke=True)
    trained = train("X-USD", data, config, CPU, log, reports.append, lambda snapshot, _: kept.append(snapshot), Notices())
    return trained, kept, reports


def test_a_window_by_index_is_the_rows_up_to_its_anchor(data: Dataset) -> None:
    windows = Windows(data, 12, CPU)
    rows, labels = windows(torch.tensor([11, 499, 250]))
    for window, label, anchor in zip(rows.numpy(), labels.numpy(), (11, 499, 250), strict=True):
        assert np.array_equal(window, data.values[anchor - 11 : anchor + 1])
        assert label == data.labels[anchor]


def test_windows_in_float16_are_those_of_float32_rounded(data: Dataset) -> None:
    anchors = torch.tensor([11, 499, 250])
    rounded, labels = Windows(data, 12, CPU, torch.float16, batch=4)(anchors)
    exact, same = Windows(data, 12, CPU)(anchors)
    assert rounded.dtype == torch.float16
    assert torch.equal(rounded, exact.half())
    assert torch.equal(labels, same)


def test_the_windows_take_no_memory_of_their_own(data: Dataset) -> None:
    windows = Windows(data, 12, CPU)
    assert windows._all.untyped_storage().nbytes() == data.values.nbytes


def test_an_epochs_end_tells_the_loss_on_every_so_many_th_validation_window(data: Dataset) -> None:
    trained, _, reports = run(data, CONFIG.model_copy(update={"window_stride": 3, "epochs": 2}))
    logits, labels = torch.from_numpy(trained.validation_logits[::3]), torch.from_numpy(data.labels[data.validation[::3]])
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels).item()
    assert reports[-1].validation_loss == pytest.approx(expected, rel=1e-5)


def test_a_steps_loss_and_gradients_are_those_of_the_plain_way(data: Dataset) -> None:
    # one step over all training windows, so that their order does not matter
    torch.manual_seed(CONFIG.seed)
    plain = PriceLSTM(5, CONFIG)
    samples = [(torch.from_numpy(data.values[i - 11 : i + 1].copy()), float(data.labels[i])) for i in data.train]
    loss = torch.stack(
        [nn.functional.binary_cross_entropy_with_logits(plain(x[None])[0], torch.tensor(y)) for x, y in samples]
    ).mean()
    loss.backward()
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    torch.optim.AdamW(plain.parameters(), lr=CONFIG.scaled_learning_rate, weight_decay=CONFIG.weight_decay).step()

    trained, (snapshot,), (report,) = run(data, CONFIG)

    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    # Adam's first moment after one step is a tenth of the gradient
    moments = [state["exp_avg"] for _, state in sorted(snapshot.optimiser["state"].items())]
    for (name, parameter), moment in zip(plain.named_parameters(), moments, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(moment / 0.1, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
        assert not torch.equal(trained.weights[name], before[name])
        torch.testing.assert_close(trained.weights[name], parameter.detach(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("stride", [1, 4, 7])
def test_an_epoch_takes_every_so_many_th_window_once_from_another_offset(stride: int) -> None:
    anchors, shuffle = torch.arange(100, 203), torch.Generator().manual_seed(1)
    epochs = [trainer._epoch_order(anchors, stride, shuffle, CPU).tolist() for _ in range(40)]
    for order in epochs:
        assert len(order) == 103 // stride
        assert {b - a for a, b in zip(sorted(order), sorted(order)[1:], strict=False)} == {stride}
        assert order != sorted(order)
    assert {min(order) for order in epochs} == {100 + offset for offset in range(stride)}, "over the epochs no window is left out"


def test_a_stride_makes_epochs_shorter(data: Dataset) -> None:
    config = CONFIG.model_copy(update={"batch_size": 32, "epochs": 3})
    assert run(data, config)[0].steps == 3 * 10
    assert run(data, config.model_copy(update={"window_stride": 5}))[0].steps == 3 * 2
    assert run(data, config.model_copy(update={"window_stride": 10_000}))[0].steps == 3, "of one window each"


def test_the_learning_rate_grows_with_the_root_of_the_batch() -> None:
    rates = [TrainConfig(batch_size=n * LEARNING_RATE_BATCH).scaled_learning_rate for n in (1, 4, 16)]
    assert rates == pytest.approx([1e-3, 2e-3, 4e-3])
    assert TrainConfig(batch_size=LEARNING_RATE_BATCH // 4).scaled_learning_rate == pytest.approx(5e-4)


def test_gradients_beyond_float16_again_and_again_are_an_error_of_their_own(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    # the CPU's loop scales nothing; here it has a scaler that was halved below one
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **_: real(device, init_scale=0.5))
    with pytest.raises(
        PermanentTrainingError, match=r"X-USD: gradients are beyond float16 again and again, the loss scale is 0\.5"
    ):
        run(data, CONFIG)
