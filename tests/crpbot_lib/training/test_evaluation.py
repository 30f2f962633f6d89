"""What is said of a model on rows it never saw."""

from __future__ import annotations

from math import log, sqrt
from typing import Any

import numpy as np
import pytest

from crpbot_lib.training.evaluation import (
    Scores,
    auc,
    back_test,
    by_part,
    calibration,
    evaluate,
    fit_temperature,
    months,
    rolling_accuracy,
)

HORIZON = 15
MINUTE_US = 60_000_000
START = 1_746_403_200_000_000
"""2025-05-05 00:00 UTC."""


def scores(logits: Any, labels: Any, minutes: Any = None) -> Scores:
    minutes = np.arange(len(labels)) if minutes is None else np.asarray(minutes)
    return Scores(START + minutes * MINUTE_US, np.asarray(logits, dtype=np.float32), np.asarray(labels, dtype=np.float32))


def guesses(minutes: int, right: float, seed: int = 0) -> Scores:
    """A model that is right in ``right`` of the windows, with labels that do not overlap and scores without memory."""
    rng = np.random.default_rng(seed)
    up = rng.random(minutes) < 0.5
    said = np.where(rng.random(minutes) < right, up, ~up)
    return scores(np.where(said, 1, -1) * rng.uniform(0.05, 0.3, minutes), up)


def evaluated(test: Scores, **changes: Any) -> dict[str, Any]:
    return evaluate(**{"test": test, "validation": test, "horizon": HORIZON, "train_base_rate": 0.5, **changes})


def test_figures_of_a_known_case() -> None:
    found = evaluated(scores([log(4)] * 300, [1, 1, 1, 0] * 75))

    assert found["accuracy"] == found["base_rate"] == found["majority_accuracy"] == 0.75
    assert found["log_loss"] == pytest.approx(-(0.75 * log(0.8) + 0.25 * log(0.2)), rel=1e-5)
    assert found["base_log_loss"] == pytest.approx(log(2))
    assert found["brier"] == pytest.approx(0.75 * 0.04 + 0.25 * 0.64)
    assert found["base_brier"] == 0.25


def test_the_base_rate_is_that_of_the_training_rows() -> None:
    found = evaluated(guesses(2000, 0.5), train_base_rate=0.8)

    up = found["base_rate"]
    assert found["base_log_loss"] == pytest.approx(-(up * log(0.8) + (1 - up) * log(0.2)))
    assert found["base_brier"] == pytest.approx(up * 0.04 + (1 - up) * 0.64)
    assert found["log_loss_gain"] == pytest.approx(found["base_log_loss"] - found["log_loss"])
    assert found["log_loss_gain_low"] > 0, "a coin beats a base rate that has changed"


def test_the_rough_standard_error_counts_overlapping_labels_once() -> None:
    found = evaluated(scores(np.tile([0.1, -0.1, 0.2], 500), np.tile([1, 0], 750)))

    assert (found["test_windows"], found["effective_n"]) == (1500, 100)
    assert found["accuracy_se"] == pytest.approx(sqrt(0.25 / 100))


def test_a_model_that_is_right_more_often_than_either_side_has_skill_and_says_by_how_much() -> None:
    found = evaluated(guesses(20_000, 0.56))

    assert found["skill"] is True
    assert found["gain"] == pytest.approx(found["accuracy"] - found["majority_accuracy"])
    assert 0 < found["gain_low"] < found["gain"] < found["gain_high"]
    low, high = 100 * found["gain_low"], 100 * found["gain_high"]
    assert (
        found["verdict"]
        == f"better than the base rate by {100 * found['gain']:.1f} points of accuracy ({low:.1f} to {high:.1f} at 95 %)"
    )
    assert found["accuracy_low"] < 0.56 < found["accuracy_high"]


def test_a_coin_has_no_skill() -> None:
    found = evaluated(guesses(20_000, 0.5))

    assert found["skill"] is False
    assert found["verdict"].startswith("no skill shown: ")
    assert found["gain_low"] < 0


def test_a_drift_that_turned_is_no_skill() -> None:
    """UP came more often before, DOWN now: a coin is then better than the former base rate, and no model."""
    rng = np.random.default_rng(0)
    found = evaluated(scores(rng.normal(0, 0.1, 20_000), rng.random(20_000) < 0.4), train_base_rate=0.6)

    assert found["accuracy_low"] > found["base_rate"] + 0.05
    assert found["skill"] is False


@pytest.mark.parametrize("share_up", [0.4, 0.5, 0.6])
def test_the_gain_is_against_the_side_that_came_more_often_however_uncertain_the_other(share_up: float) -> None:
    """In few rows of a drifting market the gain over the rarer side is large, and far less certain."""
    rng = np.random.default_rng(1)
    up = np.repeat(rng.random(40) < share_up, 15)[:580]
    found = evaluated(scores(np.where(rng.random(580) < 0.98, 1, -1) * rng.uniform(0.05, 0.3, 580) * np.sign(share_up - 0.45), up))

    assert found["gain"] == pytest.approx(found["accuracy"] - found["majority_accuracy"])
    assert found["gain_low"] < found["gain"] < found["gain_high"]
    assert f"{100 * found['gain']:.1f} points" in found["verdict"]


def test_a_few_lucky_rows_get_no_interval_and_no_verdict() -> None:
    rng = np.random.default_rng(0)
    found = evaluated(scores(rng.normal(0, 1, 200), rng.random(200) < 0.5))

    assert (found["accuracy_low"], found["accuracy_high"], found["gain"], found["skill"]) == (None, None, None, None)
    assert found["accuracy_note"] == "too few windows for an interval: 200 fill 4 blocks of 60 minutes, it takes 8"
    assert found["verdict"] == f"no verdict: {found['accuracy_note']}"
    assert found["accuracy_se"] > 0.1


def test_one_side_only_gives_words_and_no_number() -> None:
    found = evaluated(scores(np.random.default_rng(0).normal(0, 1, 2000), np.ones(2000)))

    assert (found["auc"], found["skill"], found["gain"], found["temperature"]) == (None, None, None, None)
    assert found["auc_note"] == "the price went UP after all 2,000 windows"
    assert found["verdict"] == "no verdict: the price went UP after all 2,000 windows"
    assert found["temperature_note"] == "of the validation rows: the price went UP after all 2,000 windows"
    with pytest.raises(ValueError, match="share of UP is 1: with one side only there was nothing to learn"):
        evaluated(guesses(2000, 0.5), train_base_rate=1.0)


def test_constant_scores_have_no_skill_and_an_auc_of_one_half_by_no_luck() -> None:
    found = evaluated(scores(np.full(2000, 0.04), np.random.default_rng(0).random(2000) < 0.6))

    assert found["skill"] is False
    assert found["verdict"] == "no skill shown: it gives the same score, 0.510, in all 2,000 windows"
    assert (found["auc"], found["auc_low"]) == (0.5, None)
    assert found["auc_note"].startswith("all 2,000 values are 0.5: nothing varies")


def test_a_model_that_names_one_side_always_has_no_skill() -> None:
    found = evaluated(scores(np.random.default_rng(0).uniform(0.01, 1, 2000), np.random.default_rng(1).random(2000) < 0.6))

    assert found["skill"] is False
    assert found["verdict"] == "no skill shown: it names UP in all 2,000 windows"


@pytest.mark.parametrize(
    ("logits", "labels", "why"),
    [
        ([0.1, float("nan")], [1, 0], "1 of 2 scores are NaN or infinite"),
        ([0.1, 0.2], [1, float("nan")], "1 of 2 labels are NaN or infinite"),
        ([0.1, 0.2], [1], "1 timestamps, 2 scores and 1 labels"),
        ([], [], "0 timestamps, 0 scores"),
    ],
)
def test_what_is_no_score_is_refused(logits: list[float], labels: list[float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        scores(logits, labels)


def test_the_auc_counts_pairs_and_half_of_the_ties() -> None:
    rng = np.random.default_rng(0)
    said, up = np.round(rng.normal(0, 1, 400), 1), rng.random(400) < 0.3
    pairs = said[up][:, None] - said[~up][None, :]

    area, terms = auc(scores(said, up))

    assert area == pytest.approx(np.mean((pairs > 0) + (pairs == 0) / 2))
    assert terms.mean() == pytest.approx(area)


def test_the_temperature_is_found_on_the_validation_rows_and_applied_to_the_test_rows() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 1, 20_000)
    up = rng.random(20_000) < 1 / (1 + np.exp(-true))
    validation, test = scores(3 * true[:10_000], up[:10_000]), scores(3 * true[10_000:], up[10_000:])

    found = evaluated(test, validation=validation)

    assert found["temperature"] == pytest.approx(3, rel=0.05)
    assert found["calibrated_log_loss"] < found["log_loss"] - 0.1
    assert found["temperature"] == evaluated(guesses(2000, 0.5), validation=validation)["temperature"]


def test_scores_that_say_the_opposite_are_drawn_to_one_half() -> None:
    assert fit_temperature(guesses(5000, 0.4)) == pytest.approx(100)
    with pytest.raises(ValueError, match="every score is exactly 50 %"):
        fit_temperature(scores([0.0] * 10, [0, 1] * 5))


def test_the_calibration_curve_tells_an_overconfident_model() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 0.8, 20_000)
    curve = calibration(scores(3 * true, rng.random(20_000) < 1 / (1 + np.exp(-true))), 3.0, HORIZON)

    assert [row["windows"] for row in curve] == [2000] * 10
    assert curve[-1]["probability"] > curve[-1]["share_up_high"]
    for row in curve:
        assert row["calibrated"] == pytest.approx(row["share_up"], abs=0.05)


def test_equal_scores_stay_in_one_bin() -> None:
    assert [row["windows"] for row in calibration(guesses(2000, 0.5).at(np.arange(3)), None, HORIZON)] == [1, 1, 1]
    assert len(calibration(scores([0.1] * 1000, [0, 1] * 500), None, HORIZON)) == 1


def test_each_month_and_each_regime_has_its_own_interval_or_says_why_not() -> None:
    rng = np.random.default_rng(0)
    minutes = np.concatenate([np.arange(-4 * 1440 - 3000, -4 * 1440), np.arange(100)])
    both = scores(rng.normal(0, 1, 3100), rng.random(3100) < 0.5, minutes)
    april, may = by_part(both, ["2025-04", "2025-05", "2025-06"], months(both.timestamps), HORIZON)

    assert (april["part"], april["windows"], may["part"], may["windows"]) == ("2025-04", 3000, "2025-05", 100)
    assert april["accuracy_low"] < 0.5 < april["accuracy_high"]
    assert may["accuracy_low"] is None
    assert may["accuracy_note"].startswith("too few windows")


def test_the_rolling_accuracy_follows_a_skill_that_ends() -> None:
    good, bad = guesses(10_000, 0.6, seed=1), guesses(10_000, 0.5, seed=2)
    both = scores(np.concatenate([good.logits, bad.logits]), np.concatenate([good.labels, bad.labels]))

    rolling = rolling_accuracy(both, HORIZON)

    assert rolling["minutes"] == 1999
    assert len(rolling["points"]) == 60
    assert rolling["points"][0]["accuracy_low"] > 0.5
    assert rolling["points"][0]["end"] == "2025-05-06T09:19:00Z"
    assert rolling["points"][-1]["accuracy"] == pytest.approx(0.5, abs=0.04)


def test_the_back_test_trades_one_position_at_a_time_and_pays_both_orders() -> None:
    minutes = [0, 1, 14, 15, 16, 40, 60]
    moves = np.array([0.01, 9, 9, 0.02, 9, -0.03, 0.001])

    said = scores([1, 1, 1, -1, 1, -1, 1], [1] * 7, minutes)
    found = back_test(said.timestamps, said.logits, moves, 25, HORIZON)

    assert found["trades"] == 4
    assert found["gross_bps"] == pytest.approx((100 - 200 + 300 + 10) / 4)
    assert found["net_bps"] == pytest.approx(found["gross_bps"] - 50)
    assert found["break_even_fee_bps_per_order"] == pytest.approx(found["gross_bps"] / 2)
    assert found["share_of_trades_above_their_fees"] == 0.5
    assert found["net_bps_low"] is None
    assert "information only" in found["note"]
