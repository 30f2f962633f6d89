"""A training that was put aside and gone on with is the training that was never interrupted; and only its own work is built on."""

from __future__ import annotations

import io
import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crpbot_lib.gpu.watch import clear_status
from crpbot_lib.lake import Lake, LakeError, keys
from crpbot_lib.training import PermanentTrainingError, TrainConfig, check_model, read_status
from crpbot_lib.training import job as training_job
from crpbot_lib.training.dataset import Dataset, Scaler
from crpbot_lib.training.notices import Interrupted, Notices
from crpbot_lib.training.resume import FORMAT, Checkpoints
from crpbot_lib.training.smoke import ModelLog
from crpbot_lib.training.trainer import Progress, Snapshot, Trained, train

EPOCHS = 6
LONG = {"max_steps": None, "epochs": EPOCHS, "layers": 2, "dropout": 0.3}
"""Several epochs of a network that draws from every source of chance: the shuffle, dropout between layers and before the head."""


# --- the loop ----------------------------------------------------------------------------------------------------------------

CONFIG = TrainConfig(sequence=6, layers=2, hidden=4, dropout=0.3, epochs=3, batch_size=32, window_stride=1)
PER_EPOCH = 5
STEPS = 3 * PER_EPOCH


@pytest.fixture(scope="module")
def data() -> Dataset:
    """A small symbol: 145 training windows, five steps an epoch, the last one of half a batch."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(200, 3)).astype(np.float32)
    anchors = np.arange(5, 195)
    scaler = Scaler(np.zeros(3, np.float32), np.ones(3, np.float32), 10.0)
    return Dataset(
        values=values,
        labels=(values[:, 0] > 0).astype(np.float32),
        timestamps=np.arange(200) * 60_000_000,
        close=np.ones(200),
        train=anchors[:145],
        validation=anchors[150:170],
        test=anchors[170:],
        tradable=anchors[170:],
        scaler=scaler,
        counts={},
        split="later",
        test_split="last",
    )


class Loop:
    """Trains ``data``; ends at each of ``stops`` and goes on, in the state of the world that the step before left."""

    def __init__(self, data: Dataset, config: TrainConfig = CONFIG) -> None:
        self.data, self.config = data, config
        self.kept: list[tuple[int, int]] = []
        self.reports: list[Progress] = []
        self.last: bytes = b""

    def save(self, snapshot: Snapshot, epoch: int) -> None:
        self.kept.append((epoch, snapshot.step))
        buffer = io.BytesIO()
        torch.save(vars(snapshot), buffer)
        self.last = buffer.getvalue()

    def run(self, stop_at: int | None = None, notices: Notices | None = None) -> Trained:
        """From where the last call ended, to its end or to ``stop_at``."""
        resume = Snapshot(**torch.load(io.BytesIO(self.last), weights_only=True)) if self.last else None
        torch.manual_seed(int(time.monotonic_ns()) % 2**31)  # another process has drawn other numbers
        given = notices or Counted(stop_at - (resume.step if resume else 0) if stop_at else None)
        log = ModelLog(logging.getLogger("test"), smoke=True)
        return train("X-USD", self.data, self.config, torch.device("cpu"), log, self.reports.append, self.save, given, resume)


class Counted(Notices):
    """Says after so many steps that the job must end."""

    def __init__(self, steps: int | None) -> None:
        super().__init__()
        self.steps = steps

    def wants_checkpoint(self) -> bool:
        if self.steps is not None:
            self.steps -= 1
            if self.steps == 0:
                self.end("enough")
        return super().wants_checkpoint()


@pytest.fixture(scope="module")
def uninterrupted(data: Dataset) -> Trained:
    return Loop(data).run()


def assert_same(trained: Trained, expected: Trained) -> None:
    assert trained.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert torch.equal(trained.weights[name], tensor), name
    assert np.array_equal(trained.validation_logits, expected.validation_logits)
    assert np.array_equal(trained.test_logits, expected.test_logits)
    assert (trained.steps, trained.epochs, trained.train_loss) == (expected.steps, expected.epochs, expected.train_loss)
    assert trained.history == expected.history
    assert [row["epoch"] for row in trained.history] == list(range(1, trained.epochs + 1))


# an epoch's end may fall on the same step, and then it must be a state of the next epoch
@pytest.mark.parametrize("stop_at", [1, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 1, STEPS - 1])
def test_stopped_after_any_step_and_resumed_the_weights_are_the_same_to_the_bit(
    data: Dataset, uninterrupted: Trained, stop_at: int
) -> None:
    loop = Loop(data)
    with pytest.raises(Interrupted, match="enough"):
        loop.run(stop_at)
    assert loop.kept[-1] == (-(-stop_at // PER_EPOCH), stop_at)
    assert_same(loop.run(), uninterrupted)


def test_stopped_after_every_single_step_the_weights_are_still_the_same(data: Dataset, uninterrupted: Trained) -> None:
    loop = Loop(data)
    for step in range(1, STEPS):
        # the state of an epoch's end is kept once more when the stop falls on it; the loop itself must not repeat a step
        with pytest.raises(Interrupted):
            loop.run(step)
    assert_same(loop.run(), uninterrupted)
    assert [step for _, step in loop.kept] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_with_a_stride_the_offset_of_the_epoch_is_gone_on_with(data: Dataset, stop_at: int) -> None:
    config = CONFIG.model_copy(update={"window_stride": 3})
    expected = Loop(data, config).run()
    assert expected.steps == 6
    loop = Loop(data, config)
    with pytest.raises(Interrupted):
        loop.run(stop_at)
    assert_same(loop.run(), expected)


def test_the_loss_scale_is_gone_on_with(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a GPU; it grows every fourth step
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **_: real(device, init_scale=8.0, growth_interval=4))

    def scale(loop: Loop) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(io.BytesIO(loop.last), weights_only=True)["loss_scale"]
        return state

    whole, parts = Loop(data), Loop(data)
    expected = whole.run()
    for step in range(1, STEPS):
        with pytest.raises(Interrupted):
            parts.run(step)
        assert (scale(parts)["scale"], scale(parts)["_growth_tracker"]) == (8.0 * 2 ** (step // 4), step % 4)
    assert_same(parts.run(), expected)
    assert scale(parts) == scale(whole)


def test_stopped_after_the_last_step_only_the_judging_is_left(data: Dataset, uninterrupted: Trained) -> None:
    loop = Loop(data)
    with pytest.raises(Interrupted):
        loop.run(STEPS)
    kept = list(loop.kept)
    assert_same(loop.run(), uninterrupted)
    assert loop.kept == kept, "no step was taken"


def test_steps_that_end_within_an_epoch_are_resumed_too(data: Dataset) -> None:
    config = CONFIG.model_copy(update={"max_steps": PER_EPOCH + 3})
    expected = Loop(data, config).run()
    loop = Loop(data, config)
    with pytest.raises(Interrupted):
        loop.run(PER_EPOCH + 2)
    assert_same(loop.run(), expected)
    assert (expected.steps, expected.epochs) == (PER_EPOCH + 3, 2)


@pytest.mark.parametrize("lost", ["rng", "shuffle", "optimiser"])
def test_each_part_of_the_state_is_needed(data: Dataset, uninterrupted: Trained, lost: str) -> None:
    # the proof that the tests above would see a part that is not restored
    loop, fresh = Loop(data), Loop(data)
    for one, stop_at in ((loop, PER_EPOCH + 2), (fresh, 1)):
        with pytest.raises(Interrupted):
            one.run(stop_at)
    state, other = (torch.load(io.BytesIO(one.last), weights_only=True) for one in (loop, fresh))
    state[lost] = other[lost] if lost != "rng" else torch.Generator().manual_seed(99).get_state()
    loop.save(Snapshot(**state), 2)
    again = loop.run()
    assert any(not torch.equal(again.weights[name], tensor) for name, tensor in uninterrupted.weights.items())


def test_every_epoch_is_kept_and_a_recommendation_asks_for_one_more(data: Dataset, uninterrupted: Trained) -> None:
    loop = Loop(data)
    notices = Notices()
    notices.recommend_checkpoint()
    assert_same(loop.run(notices=notices), uninterrupted)
    assert loop.kept == [(1, 1), (1, 5), (2, 10), (3, 15)]
    assert [(p.epoch, p.epochs, p.step, p.steps) for p in loop.reports] == [(-(-s // 5), 3, s, 15) for s in (1, 5, 10, 15)]
    assert loop.reports[-1].eta_seconds == 0
    assert loop.reports[0].eta_seconds > 0


# --- the lake ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(features_lake: Any, tmp_path: Path, data: Dataset) -> Any:
    """A lake, its job, and a snapshot to keep in it."""
    own = features_lake.copy(tmp_path)
    loop = Loop(data)
    with pytest.raises(Interrupted):
        loop.run(2)
    own_spec = training_job.read_spec(own.lake, own.run)
    snapshot = Snapshot(**torch.load(io.BytesIO(loop.last), weights_only=True))

    class Kept:
        lake, spec = own.lake, own_spec

        def checkpoints(self, symbol: str = "ETH-USD", lake: Lake | None = None, **others: Any) -> Checkpoints:
            return Checkpoints(lake or self.lake, others.pop("spec", self.spec), symbol, **others)

        def at(self, step: int) -> Snapshot:
            return replace(snapshot, step=step)

        def key(self, slot: int, suffix: str) -> Path:
            name = keys.run_symbol(self.spec.run, "ETH-USD", f"{keys.CHECKPOINT_SLOTS[slot]}.{suffix}")
            return Path(self.lake.root.removeprefix("file://")) / name

    return Kept()


def test_the_newest_checkpoint_counts(kept: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert kept.checkpoints().newest() is None
    writer = kept.checkpoints(generation=1)
    for step in (10, 20, 30):
        assert writer.save(kept.at(step), epoch=step // 10)

    found = kept.checkpoints(generation=2).newest()
    assert found is not None
    assert found.step == 30
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in kept.at(30).weights.items())
    assert sorted(path.name for path in kept.key(0, "pt").parent.iterdir()) == [
        "checkpoint-2.json",
        "checkpoint-2.pt",
        "checkpoint.json",
        "checkpoint.pt",
    ]
    size = kept.key(0, "pt").stat().st_size
    assert f"ETH-USD: checkpoint at epoch 3, step 30: {size:,} bytes in " in caplog.text
    assert "ETH-USD: resuming at epoch 3, step 30, of generation 1" in caplog.text
    note = json.loads(kept.key(0, "json").read_text())
    assert {"epoch": 3, "step": 30, "generation": 1, "bytes": size, "format": FORMAT}.items() <= note.items()


def test_after_a_resumption_the_last_good_checkpoint_is_not_the_first_to_be_overwritten(kept: Any) -> None:
    kept.checkpoints().save(kept.at(10), epoch=1)
    second = kept.checkpoints(generation=2)
    assert second.newest() is not None
    second.save(kept.at(20), epoch=2)
    assert json.loads(kept.key(0, "json").read_text())["step"] == 10
    assert json.loads(kept.key(1, "json").read_text())["step"] == 20


class DiesBeforeTheNote(Lake):
    """A writer that is killed after the data and before the note."""

    def write_json(self, key: str, value: Any, **_: Any) -> None:
        raise LakeError(f"{key}: the instance is gone")


def test_a_writer_that_dies_between_data_and_note_leaves_the_former_checkpoint(kept: Any, caplog: pytest.LogCaptureFixture) -> None:
    first = kept.checkpoints()
    first.save(kept.at(10), epoch=1)
    first.save(kept.at(20), epoch=2)
    dying = kept.checkpoints(lake=DiesBeforeTheNote(kept.lake.root))
    assert dying.newest().step == 20  # type: ignore[union-attr]
    assert not dying.save(kept.at(30), epoch=3)

    found = kept.checkpoints().newest()
    assert found is not None
    assert found.step == 20
    assert "no checkpoint at epoch 3, step 30: LakeError" in caplog.text


def test_a_note_without_its_own_data_is_not_used_and_the_line_says_why(kept: Any, caplog: pytest.LogCaptureFixture) -> None:
    writer = kept.checkpoints()
    writer.save(kept.at(10), epoch=1)
    writer.save(kept.at(20), epoch=2)
    kept.key(1, "pt").write_bytes(kept.key(1, "pt").read_bytes()[:-7])

    assert kept.checkpoints().newest().step == 10  # type: ignore[union-attr]
    assert "checkpoint-2.pt is not used: it has sha256 " in caplog.text
    kept.key(0, "pt").unlink()
    kept.key(1, "json").write_text("{half a no")
    assert kept.checkpoints().newest() is None
    assert "checkpoint.pt does not exist" in caplog.text
    assert "checkpoint-2.json is not JSON" in caplog.text


@pytest.mark.parametrize("changed", ["configuration", "features", "catalog", "smoke", "format", "begun anew"])
def test_work_of_another_job_is_ignored_and_the_line_says_why(kept: Any, caplog: pytest.LogCaptureFixture, changed: str) -> None:
    kept.checkpoints(generation=1).save(kept.at(10), epoch=1)
    spec, file = kept.spec, kept.spec.features["ETH-USD"]
    others: dict[str, Any] = {}
    if changed == "configuration":
        others, why = {"spec": spec.model_copy(update={"train": spec.train.model_copy(update={"hidden": 17})})}, "config_sha256 is "
    elif changed == "smoke":
        others, why = {"spec": spec.model_copy(update={"smoke": False})}, "config_sha256 is "
    elif changed in ("features", "catalog"):
        field = {"features": "sha256", "catalog": "catalog"}[changed]
        features = {**spec.features, "ETH-USD": file.model_copy(update={field: "0ther"})}
        others, why = {"spec": spec.model_copy(update={"features": features})}, "the job's is 0ther"
    elif changed == "format":
        note = json.loads(kept.key(0, "json").read_text())
        kept.key(0, "json").write_text(json.dumps(note | {"format": FORMAT + 1}))
        why = f"it has format {FORMAT + 1}, this code reads {FORMAT}"
    else:
        others, why = {"since": 2}, "it is of generation 1, and the run was begun anew with 2"

    assert kept.checkpoints(**others).newest() is None
    line = next(r.getMessage() for r in caplog.records if "checkpoint.json is not used" in r.getMessage())
    assert why in line


# --- the job, as processes that are really ended ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(features_lake: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of ETH-USD's model after a training that nothing interrupted."""
    own = features_lake.copy(tmp_path_factory.mktemp("uninterrupted"))
    spec = training_job.read_spec(own.lake, own.run)
    changed = spec.model_copy(update={"symbols": ("ETH-USD",), "train": spec.train.model_copy(update=LONG)})
    own.lake.write_json(keys.training_run(own.run, "job.json"), changed.model_dump(mode="json"))
    training_job.run(own.lake, own.run)
    return own.lake.read(keys.run_symbol(own.run, "ETH-USD", "model.pt"))


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_was_ended_goes_on_on_the_next_instance_and_ends_with_the_same_model(
    features_lake: Any, tmp_path: Path, respec: Callable[..., Any], job: Callable[..., Any], expected: bytes, ending: signal.Signals
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, train=LONG)
    first = job(own, CRPBOT_GENERATION="1")
    first.until("ETH-USD: epoch 2/")
    sent = time.monotonic()
    first.process.send_signal(ending)
    status = first.end(30)
    assert time.monotonic() - sent < 10
    told = read_status(own.lake, own.run)
    assert told is not None
    if ending == signal.SIGTERM:
        assert status == 75, first.output
        assert (told["state"], told["error"]) == ("interrupted", "SMOKE SIGTERM: the process was told to end")
        assert [s["state"] for s in told["symbols"].values()] == ["succeeded", "interrupted"]
        assert told["symbols"]["ETH-USD"]["checkpoint_step"] == told["symbols"]["ETH-USD"]["step"]
    else:
        assert (status, told["state"]) == (-9, "running")
    assert not own.lake.exists(keys.run_symbol(own.run, "ETH-USD", "model.pt"))
    finished = own.lake.read(keys.run_symbol(own.run, "BTC-USD", "metrics.json"))

    second = job(own, CRPBOT_GENERATION="2")
    assert second.end() == 0, second.output
    assert "BTC-USD: trained by generation 1 already, its model is kept" in second.output
    assert "BTC-USD: epoch" not in second.output
    assert "ETH-USD: resuming at epoch " in second.output
    assert "ETH-USD: epoch 1/" not in second.output
    assert own.lake.read(keys.run_symbol(own.run, "BTC-USD", "metrics.json")) == finished
    assert own.lake.read(keys.run_symbol(own.run, "ETH-USD", "model.pt")) == expected
    told = read_status(own.lake, own.run)
    assert told is not None
    assert (told["state"], told["generation"]) == ("succeeded", 2)
    assert {s["state"] for s in told["symbols"].values()} == {"succeeded"}


def test_a_spot_notice_ends_the_job_in_order_long_before_the_instance_ends(
    features_lake: Any, tmp_path: Path, respec: Callable[..., Any], job: Callable[..., Any], metadata: Any, proof: list[str]
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",), train={"max_steps": None, "epochs": 100_000})
    process = job(own, AWS_EC2_METADATA_SERVICE_ENDPOINT=metadata.url, AWS_EC2_METADATA_DISABLED="true")
    process.until("ETH-USD: epoch 1/")
    metadata.rebalance("2025-05-29T09:58:00Z")
    process.until("rebalance recommendation of 2025-05-29T09:58:00Z")
    sent = time.monotonic()
    metadata.spot_notice("2025-05-29T10:02:00Z")
    assert process.end(60) == 75, process.output
    seconds = time.monotonic() - sent
    assert seconds < 15
    proof.append(f"spot notice to the end of the job: {seconds:.1f} s of 120 s")

    told = read_status(own.lake, own.run)
    assert told is not None
    assert told["state"] == "interrupted"
    assert told["error"] == "SMOKE spot notice: EC2 will terminate this instance at 2025-05-29T10:02:00Z"
    assert read_note(own)["step"] == told["symbols"]["ETH-USD"]["checkpoint_step"] == told["symbols"]["ETH-USD"]["step"]


def read_note(own: Any) -> dict[str, Any]:
    """The newest checkpoint's."""
    notes = [keys.checkpoint_note(own.run, "ETH-USD", slot) for slot in keys.CHECKPOINT_SLOTS]
    found: dict[str, Any] = max((own.lake.read_json(key) for key in notes if own.lake.exists(key)), key=lambda note: note["step"])
    return found


def test_a_job_that_hangs_is_ended_all_the_same(
    features_lake: Any, tmp_path: Path, respec: Callable[..., Any], job: Callable[..., Any], metadata: Any
) -> None:
    own = features_lake.copy(tmp_path)
    # the store answers no more while the features are read; the limit's 60 s are one second
    before = (
        "import time, threading, crpbot_lib.training.job as job\n"
        "job.load_features = lambda *_: (print('reading', flush=True), threading.Event().wait())\n"
        "sleep = time.sleep; time.sleep = lambda seconds: sleep(seconds / 60)"
    )
    process = job(own, before, AWS_EC2_METADATA_SERVICE_ENDPOINT=metadata.url)
    process.until("reading")
    metadata.spot_notice("2025-05-29T10:02:00Z")
    assert process.end(60) == 75, process.output
    assert "told to end 60 s ago and not done: ending now" in process.output


def test_a_model_that_is_not_the_metrics_one_is_trained_again_from_its_last_checkpoint(
    features_lake: Any, tmp_path: Path, respec: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))
    caplog.set_level(logging.INFO)
    training_job.run(own.lake, own.run, generation=1)
    key = keys.run_symbol(own.run, "ETH-USD", "model.pt")
    model = own.lake.read(key)
    own.lake.write(key, model[:-1])

    training_job.run(own.lake, own.run, generation=2)

    assert own.lake.read(key) == model
    assert "ETH-USD: the finished model is not this job's, it is trained again: model.pt has sha256" in caplog.text
    assert "ETH-USD: resuming at epoch 2, step 30, of generation 1" in caplog.text


def test_a_deliberate_repetition_trains_anew_and_goes_on_with_its_own_work_only(
    features_lake: Any, tmp_path: Path, respec: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    own = features_lake.copy(tmp_path)
    respec(own, symbols=("ETH-USD",))
    caplog.set_level(logging.INFO)
    training_job.run(own.lake, own.run, generation=1)
    clear_status(own.lake, own.run)

    notices = Notices()
    notices.end("enough")
    with pytest.raises(Interrupted):
        training_job.run(own.lake, own.run, generation=2, notices=notices)
    caplog.clear()
    # nor is one that was ended before it had even read its job, or could not
    job = own.lake.read_json(keys.training_run(own.run, "job.json"))
    own.lake.write(keys.training_run(own.run, "job.json"), b"no JSON")
    with pytest.raises(PermanentTrainingError, match="is no valid job"):
        training_job.run(own.lake, own.run, generation=2)
    with pytest.raises(PermanentTrainingError, match=r"ETH-USD: run .* made no model, its state is failed: .* is no valid job"):
        check_model(own.lake, own.run, "ETH-USD")
    own.lake.write_json(keys.training_run(own.run, "job.json"), job)
    # an interrupted repetition is no success: clearing it goes on with what it has, and with nothing older
    clear_status(own.lake, own.run)
    training_job.run(own.lake, own.run, generation=3)
    metrics = own.lake.read_json(keys.run_symbol(own.run, "ETH-USD", "metrics.json"))
    assert metrics["generation"] == 3
    assert "it is of generation 1, and the run was begun anew with 2" in caplog.text
    caplog.clear()
    training_job.run(own.lake, own.run, generation=4)
    assert "ETH-USD: trained by generation 3 already, its model is kept" in caplog.text
