"""Windows and labels know nothing they must not know. The frames here are synthetic: two numbered features."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from crpbot_lib.training.config import FeatureFile, TrainConfig
from crpbot_lib.training.dataset import DOWN, EQUAL, UNKNOWN, UP, Scaler, build, check_frame, labels
from crpbot_lib.training.errors import PermanentTrainingError

START = datetime(2025, 5, 5, tzinfo=UTC)
MINUTE = 60_000_000
CONFIG = TrainConfig(sequence=10, horizon=5, embargo=20, validation_fraction=0.25, test_fraction=0.25)


def synthetic(minutes: list[int], seed: int = 0) -> pl.DataFrame:
    """A features frame with the given minutes after START; feature ``a`` is the minute's number."""
    rng = np.random.default_rng(seed)
    n = len(minutes)
    return pl.DataFrame(
        {
            "timestamp": pl.Series([START + timedelta(minutes=m) for m in minutes], dtype=pl.Datetime("us", "UTC")),
            "close": 100 + rng.normal(size=n).cumsum(),
            "session": ["tokyo"] * n,
            "volatility_regime": ["low"] * n,
            "a": pl.Series(minutes, dtype=pl.Float32),
            "b": pl.Series(rng.normal(size=n), dtype=pl.Float32),
        }
    )


def minute_of(frame: pl.DataFrame, rows: np.ndarray) -> np.ndarray:
    return ((frame["timestamp"].dt.epoch("us").to_numpy()[rows] - int(START.timestamp() * 1e6)) // MINUTE).astype(int)


def test_the_label_compares_the_close_one_horizon_later() -> None:
    times = np.arange(8, dtype=np.int64) * MINUTE
    close = np.array([10.0, 10, 10, 11, 9, 10, 11, 12])

    assert labels(times, close, 3).tolist() == [UP, DOWN, EQUAL, EQUAL, UP, UNKNOWN, UNKNOWN, UNKNOWN]


def test_a_label_across_an_outage_is_unknown() -> None:
    times = np.array([0, 1, 2, 3, 60, 61, 62, 63], dtype=np.int64) * MINUTE

    found = labels(times, np.arange(8.0), 2)

    assert found.tolist() == [UP, UP, UNKNOWN, UNKNOWN, UP, UP, UNKNOWN, UNKNOWN]


def test_no_window_and_no_label_spans_an_outage_or_a_border() -> None:
    present = [*range(0, 200), *range(230, 420), *range(421, 600)]
    frame = synthetic(present)

    data = build("X", frame, ("a", "b"), CONFIG, [])

    first, second = ((datetime.fromisoformat(at) - START) // timedelta(minutes=1) for at in (data.split, data.test_split))
    assert 200 < first < second < 500
    there = set(present)
    for part in (data.train, data.validation, data.test):
        assert len(part) > 50
        for last in minute_of(frame, part):
            needed = range(last - CONFIG.sequence + 1, last + CONFIG.horizon + 1)
            assert there.issuperset(needed), f"the window that ends at minute {last} reaches over an outage"
    for earlier, later, border in ((data.train, data.validation, first), (data.validation, data.test, second)):
        assert minute_of(frame, earlier).max() + CONFIG.horizon < border
        assert minute_of(frame, later).min() - CONFIG.sequence + 1 >= border + CONFIG.embargo


def test_every_row_that_may_be_used_is_used() -> None:
    frame = synthetic(list(range(400)))

    data = build("X", frame, ("a", "b"), CONFIG, [])

    assert (data.train[0], data.train[-1]) == (9, 194), "from the first whole window to the last label before row 200"
    assert (data.validation[0], data.validation[-1]) == (229, 294), (
        "from border + embargo + window to the last label before row 300"
    )
    assert (data.test[0], data.test[-1]) == (329, 394), "from border + embargo + window to the last label"
    assert data.counts["at_split"] == (229 - 194 - 1) + (329 - 294 - 1)
    assert data.counts["without_label"] == 5
    assert data.counts["without_window"] == 9


def test_each_row_carries_its_minute_and_its_close() -> None:
    frame = synthetic([*range(0, 200), *range(230, 600)])

    data = build("X", frame, ("a", "b"), CONFIG, [])

    at = data.test[17]
    assert datetime.fromtimestamp(data.timestamps[at] / 1e6, UTC) == frame["timestamp"][int(at)]
    assert data.close.tolist() == frame["close"].to_list()
    assert data.labels[at] == float(data.close[at + CONFIG.horizon] > data.close[at])


def test_a_window_lies_in_memory_in_one_piece() -> None:
    data = build("X", synthetic(list(range(400))), ("a", "b"), CONFIG, [])

    assert data.values[100:110].flags.c_contiguous


def test_shares_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(ValueError, match=r"validation_fraction 0\.5 and test_fraction 0\.5 leave no rows to train on"):
        TrainConfig(validation_fraction=0.5, test_fraction=0.5)


def test_a_filled_minute_stands_in_windows_and_is_no_anchor() -> None:
    """It is there because a trade came later; live refuses such a minute."""
    frame = synthetic(list(range(400)))
    filled = [("2025-05-05T00:50Z", 3), ("2025-05-05T04:00Z", 1), ("2025-05-05T05:40Z", 1), ("2025-05-05T09:00Z", 2)]

    plain, data = build("X", frame, ("a", "b"), CONFIG, []), build("X", frame, ("a", "b"), CONFIG, filled)

    assert set(plain.train) - set(data.train) == {50, 51, 52}
    assert set(plain.validation) - set(data.validation) == {240}
    assert set(plain.test) - set(data.test) == {340}
    assert set(data.train) <= set(plain.train)
    assert 55 in data.train, "its window holds the filled minutes"
    assert (plain.counts["filled"], data.counts["filled"]) == (0, 5), "of the minutes that have a row"
    assert data.counts["at_split"] == plain.counts["at_split"]


def test_equal_prices_are_dropped_and_counted() -> None:
    frame = synthetic(list(range(400))).with_columns(close=pl.when(pl.col("a") < 100).then(50.0).otherwise("close"))

    data = build("X", frame, ("a", "b"), CONFIG, [])

    assert data.counts["equal_prices_dropped"] == 95
    assert data.train.min() == 95
    assert set(np.unique(data.labels[data.train])) == {0.0, 1.0}


def test_the_back_test_trades_where_the_price_will_stand_still_too() -> None:
    """Whoever trades does not know that it will; of an outage to come nothing can be said, for there is no price to close at."""
    minutes = [m for m in range(400) if m != 380]
    frame = synthetic(minutes).with_columns(close=pl.when(pl.col("a").is_between(350, 359)).then(50.0).otherwise("close"))

    data = build("X", frame, ("a", "b"), CONFIG, [])

    assert set(minute_of(frame, data.tradable)) - set(minute_of(frame, data.test)) == set(range(350, 355))
    assert set(data.test) < set(data.tradable)
    assert not set(range(375, 390)) & set(minute_of(frame, data.tradable))


def test_the_scaler_knows_the_training_rows_only() -> None:
    frame = synthetic(list(range(400)))
    spoiled = frame.with_columns(b=pl.when(pl.col("a") > 194).then(1e6).otherwise("b").cast(pl.Float32))

    data, other = build("X", frame, ("a", "b"), CONFIG, []), build("X", spoiled, ("a", "b"), CONFIG, [])

    assert data.scaler.mean.tolist() == other.scaler.mean.tolist()
    assert data.scaler.scale.tolist() == other.scaler.scale.tolist()
    assert data.scaler.mean[0] == pytest.approx(np.arange(195).mean())
    assert data.scaler.scale[0] == pytest.approx(np.arange(195).std())


def test_a_constant_feature_is_centred_and_a_far_value_is_cut() -> None:
    values = np.array([[5.0, 1.0], [5.0, 3.0]], dtype=np.float32)
    scaler = Scaler.fit(values, clip=10)

    assert scaler.transform(np.array([[5.0, 1e9], [6.0, 2.0]], dtype=np.float32)).tolist() == [[0.0, 10.0], [1.0, 0.0]]


def test_two_days_are_enough_for_a_smoke_run() -> None:
    data = build("X", synthetic(list(range(2 * 1440))), ("a", "b"), TrainConfig.for_smoke(), [])

    assert len(data.train) > 1900
    # of its share: without embargo, first window, and labels that end later
    assert len(data.validation) == len(data.test) == 432 - 60 - 59 - 15


def test_too_few_rows_say_so() -> None:
    with pytest.raises(PermanentTrainingError, match=r"X: 60 rows give .* training, 0 validation and 0 test windows.*more days"):
        build("X", synthetic(list(range(60))), ("a", "b"), CONFIG, [])


def expectation(frame: pl.DataFrame, names: tuple[str, ...] = ("a", "b")) -> FeatureFile:
    return FeatureFile(key="features.parquet", sha256="", rows=frame.height, features=len(names), names=names, catalog="c")


FRAME = synthetic(list(range(50)))


@pytest.mark.parametrize(
    ("frame", "difference"),
    [
        (FRAME.drop("b"), "has 1 numeric features, the job expects 2.*not in the file: b"),
        (FRAME.with_columns(c=pl.lit(1.0, pl.Float32)), "has 3 numeric features.*not in the job: c"),
        (
            FRAME.select("timestamp", "close", "session", "volatility_regime", "b", "a"),
            "the order differs from position 0: file b, job a",
        ),
        (FRAME.with_columns(pl.col("b").cast(pl.Float64)), "b is Float64, expected Float32"),
        (FRAME.head(49), "49 rows, the job expects 50"),
        (FRAME.with_columns(b=pl.when(pl.col("a") == 3).then(None).otherwise("b")), "b holds null, NaN or infinite"),
        (FRAME.with_columns(b=pl.lit(float("nan"), pl.Float32)), "b holds null, NaN or infinite"),
        (FRAME.with_columns(close=pl.lit(None, pl.Float64)), "close holds null, NaN or infinite"),
        (FRAME.drop("volatility_regime"), "column volatility_regime is absent"),
        (FRAME.reverse(), "not sorted, unique and on the minute grid"),
    ],
)
def test_a_file_that_is_not_what_the_job_was_told_is_refused_with_the_difference(frame: pl.DataFrame, difference: str) -> None:
    with pytest.raises(PermanentTrainingError, match=difference):
        check_frame("X", frame, expectation(FRAME))


def test_a_file_that_is_what_the_job_was_told_passes() -> None:
    check_frame("X", FRAME, expectation(FRAME))
