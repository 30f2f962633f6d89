"""The loops: real smoke models, deciding on recorded minutes (real ones where they are at hand)."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import SecretStr
from typer.testing import CliRunner

from crpbot_lib import cli, registry, runtime
from crpbot_lib.config import PromotionSettings, RuntimeSettings, Settings, TelegramSettings
from crpbot_lib.features import catalog
from crpbot_lib.lake import Lake, LakeError, keys
from crpbot_lib.market_data import MarketDataError
from crpbot_lib.registry import AlignmentError
from crpbot_lib.runtime import RuntimeRefusedError, Signal, loop, telegram
from crpbot_lib.runtime.market import MarketAt
from crpbot_lib.runtime.predict import NoDecisionError, PredictionError, decide, live_features, stuck
from crpbot_lib.training.checkpoint import Checkpoint

MINUTE = timedelta(minutes=1)
AT = datetime(2025, 5, 29, 0, 10, tzinfo=UTC)


def settings(as_of: datetime | None = AT, **changes: Any) -> Settings:
    return Settings(promotion=PromotionSettings(allow_smoke=True), runtime=RuntimeSettings(as_of=as_of), **changes)


@pytest.fixture(scope="session")
def published(trained_lake: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A published, not promoted smoke version. Not to be written to."""
    own = trained_lake.copy(tmp_path_factory.mktemp("published"))
    return own, str(registry.publish(settings(), own.lake, own.run)["version"])


@pytest.fixture
def real(published: tuple[Any, str], tmp_path: Path) -> tuple[Any, str]:
    """The same models as a promoted version that claims to be no smoke models and to have skill: what live mode needs, and no
    test can train."""
    own, version = published[0].copy(tmp_path), published[1]
    manifest = registry.show(settings(), own.lake, version) | {"smoke": False, "version": "2025-05-29-real"}
    for entry in manifest["symbols"].values():
        data = own.lake.read(keys.model("models", version, entry["file"]))
        data = replace(Checkpoint.from_bytes(data, "test"), smoke=False).to_bytes()
        entry["metrics"]["skill"] = True
        entry["sha256"] = registry.versions.hashlib.sha256(data).hexdigest()
        own.lake.write(keys.model("models", "2025-05-29-real", entry["file"]), data)
    own.lake.write_json(keys.model("models", "2025-05-29-real", "manifest.json"), manifest)
    registry.promote(settings(), own.lake, "2025-05-29-real", evidence("2025-05-29-real"))
    return own, "2025-05-29-real"


def evidence(version: str) -> dict[str, Any]:
    """What a dry run of five good rounds leaves."""
    predictions = [{"symbol": s, "probability": 0.6} for s in ("BTC-USD", "ETH-USD") for _ in range(5)]
    return {"model": version, "not_stuck": True, "iterations": 5, "predictions": predictions}


class Minutes:
    """A clock that only sleeping moves."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.slept: list[float] = []

    def clock(self) -> datetime:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += timedelta(seconds=seconds)


def test_a_dry_run_replays_consecutive_minutes_without_waiting(published: tuple[Any, str], recorded: Any) -> None:
    own, version = published
    time = Minutes(datetime(2030, 1, 1, tzinfo=UTC))
    lines: list[str] = []
    recorded.asked.clear()

    result = runtime.run(
        settings(), own.lake, "dryrun", 5, version, clock=time.clock, sleep=time.sleep, source=recorded, emit=lines.append
    )

    assert time.slept == []
    assert result["not_stuck"] is True
    assert (result["model"], result["iterations"], result["smoke"], result["skipped"]) == (version, 5, True, [])
    btc = [p for p in result["predictions"] if p["symbol"] == "BTC-USD"]
    assert [p["at"] for p in btc] == [(AT + i * MINUTE).isoformat() for i in range(5)]
    assert len({p["probability"] for p in btc}) == 5, "every minute has its own probability"
    assert len(lines) == 10
    assert all(line.startswith("SMOKE ") for line in lines)
    assert len(recorded.asked) == len(set(recorded.asked)), "every series is fetched once for the whole replay"
    json.dumps(result, allow_nan=False)


def test_a_decision_is_the_models_word_on_the_training_files_rows(published: tuple[Any, str], recorded: Any) -> None:
    """Parity: the runtime's window gives what the features file gives for the same minutes."""
    own, version = published
    at = own.end
    rows = own.lake.read_frame(keys.features(own.version, "BTC-USD")).tail(60)
    model = registry.load_model(settings(), own.lake, version, "BTC-USD")

    result = runtime.run(settings(at), own.lake, "dryrun", 1, version, symbols=["BTC-USD"], source=recorded)

    assert rows["timestamp"][-1] == at - MINUTE
    expected = model.predict(rows.select(model.names).to_numpy())
    assert result["predictions"][0]["probability"] == pytest.approx(expected, abs=1e-6)


def test_each_decision_uses_only_what_was_known_then(recorded: Any) -> None:
    market = MarketAt(recorded, AT, until=AT + 30 * MINUTE)
    start = AT - timedelta(days=1)
    for now in (AT, AT + 7 * MINUTE):
        market.now = now
        for timeframe, width in (("1m", 1), ("5m", 5), ("15m", 15), ("1h", 60)):
            candles = market.candles("BTC-USD", timeframe, start, AT + 30 * MINUTE)
            last = candles["timestamp"][-1]
            assert last + width * MINUTE <= now < last + 2 * width * MINUTE, "the last closed candle, and no later one"
        hourly = market.hourly("bitcoin", start, AT + 30 * MINUTE)
        assert hourly["available_at"].max() <= now
        # the point of 00:00 appears at 00:35
        assert market.daily("bitcoin", start - timedelta(days=3), AT + 30 * MINUTE)["timestamp"].max().day == 28


def test_a_replay_decides_as_a_run_at_that_minute_would(published: tuple[Any, str], recorded: Any) -> None:
    own, version = published

    replay = runtime.run(settings(), own.lake, "dryrun", 4, version, symbols=["BTC-USD"], source=recorded)
    alone = runtime.run(settings(AT + 3 * MINUTE), own.lake, "dryrun", 1, version, symbols=["BTC-USD"], source=recorded)

    assert replay["predictions"][-1] == alone["predictions"][0]


def test_without_as_of_each_round_waits_for_a_minute_to_close(published: tuple[Any, str], recorded: Any) -> None:
    own, version = published
    time = Minutes(AT - timedelta(seconds=20))

    result = runtime.run(
        settings(None), own.lake, "dryrun", 3, version, symbols=["ETH-USD"], clock=time.clock, sleep=time.sleep, source=recorded
    )

    assert time.slept == [25.0, 60.0, 60.0], "to the minute's end and the time that the exchange needs"
    assert [p["at"] for p in result["predictions"]] == [(AT + i * MINUTE).isoformat() for i in range(3)]


def test_a_window_too_short_for_the_warm_up_and_the_model_is_refused_at_the_start(
    published: tuple[Any, str], recorded: Any
) -> None:
    own, version = published
    needed = catalog.SEGMENT_WARM_UP + 60

    def dry_run(window_minutes: int) -> dict[str, Any]:
        config = Settings(runtime=RuntimeSettings(as_of=AT, window_minutes=window_minutes))
        return runtime.run(config, own.lake, "dryrun", 1, version, symbols=["ETH-USD"], source=recorded)

    assert len(dry_run(needed)["predictions"]) == 1
    with pytest.raises(
        RuntimeRefusedError, match=rf"window_minutes is {needed - 1}: ETH-USD needs at least {needed}, .*WINDOW_MIN"
    ):
        dry_run(needed - 1)


def test_points_are_fetched_again_only_once_a_new_one_can_have_appeared(published: tuple[Any, str], recorded: Any) -> None:
    own, version = published
    time = Minutes(datetime(2025, 5, 29, 1, 20, 30, tzinfo=UTC))
    recorded.asked.clear()

    runtime.run(
        settings(None), own.lake, "dryrun", 3, version, symbols=["ETH-USD"], clock=time.clock, sleep=time.sleep, source=recorded
    )

    assert recorded.asked.count(("1m", "ETH-USD")) == 3
    assert recorded.asked.count(("hourly", "ethereum")) == recorded.asked.count(("daily", "ethereum")) == 1


@pytest.mark.parametrize(
    ("series", "width", "lag"), [("hourly", timedelta(hours=1), 5 * MINUTE), ("daily", timedelta(days=1), 35 * MINUTE)]
)
def test_a_point_stamped_late_does_not_hide_the_next_one_that_is_not(series: str, width: timedelta, lag: timedelta) -> None:
    slot = datetime(2025, 5, 28, tzinfo=UTC)
    late, prompt = slot + timedelta(minutes=14, seconds=30), slot + width + timedelta(seconds=10)
    served = pl.DataFrame({"timestamp": [slot, slot + width], "available_at": [late + lag, prompt + lag]})
    asked: list[datetime] = []

    class Served:
        """What CoinGecko would answer at the market's own time."""

        def points(self, _coin: str, start: datetime, end: datetime) -> pl.DataFrame:
            asked.append(market.now)
            return served.filter((pl.col("timestamp") >= start) & (pl.col("available_at") - lag <= market.now))

        hourly = daily = points

    market = MarketAt(Served(), late + lag + MINUTE)
    newest = {}
    appears = (prompt + lag).replace(second=0) + MINUTE
    for now in (market.now, appears - 10 * MINUTE, appears - 2 * MINUTE, appears, appears + 5 * MINUTE):
        market.now = now
        newest[now] = getattr(market, series)("bitcoin", slot, now)["timestamp"][-1]

    assert newest[appears - 2 * MINUTE] == slot
    assert newest[appears] == slot + width, "known as soon as it can be read"
    assert asked == [late + lag + MINUTE, appears], "and asked for no sooner"


def test_the_line_of_a_signal() -> None:
    long = Signal("BTC-USD", AT, 0.653, smoke=False)
    short = Signal("ETH-USD", AT, 0.419, smoke=True)

    assert long.line == "BTC-USD: long @ 65.3% (LSTM: 0.653)"
    assert short.line == "SMOKE ETH-USD: short @ 58.1% (LSTM: 0.419)"


@pytest.mark.parametrize(
    ("probabilities", "symptom"),
    [
        ([0.5, 0.5, 0.5], "stuck at 50 %.*feature mismatch between the three counts"),
        ([0.5], "stuck at 50 %"),
        ([0.61, 0.61, 0.61 + 1e-8], r"stuck at 0\.610000 in all 3 predictions.*feature mismatch"),
        ([], "no decision at all"),
    ],
)
def test_stuck_predictions_are_named(probabilities: list[float], symptom: str) -> None:
    import re

    cause = stuck([Signal("BTC-USD", AT, p, False) for p in probabilities])

    assert cause is not None
    assert re.search(symptom, cause)


@pytest.mark.parametrize("probabilities", [[0.61], [0.5, 0.5001], [0.4999, 0.5, 0.5001]])
def test_predictions_near_a_half_that_move_are_not_stuck(probabilities: list[float]) -> None:
    assert stuck([Signal("BTC-USD", AT, p, False) for p in probabilities]) is None


def test_a_model_that_does_not_react_is_reported_and_not_promoted(
    published: tuple[Any, str], recorded: Any, tmp_path: Path
) -> None:
    own, version = published[0].copy(tmp_path), published[1]
    manifest = registry.show(settings(), own.lake, version)
    entry = manifest["symbols"]["BTC-USD"]
    key = keys.model("models", version, entry["file"])
    model = Checkpoint.from_bytes(own.lake.read(key), "test")
    dead = replace(model, weights={**model.weights, "head.weight": torch.zeros_like(model.weights["head.weight"])}).to_bytes()
    entry["sha256"] = registry.versions.hashlib.sha256(dead).hexdigest()
    own.lake.write(key, dead)
    own.lake.write_json(keys.model("models", version, "manifest.json"), manifest)

    result = runtime.run(settings(), own.lake, "dryrun", 5, version, source=recorded)

    assert result["not_stuck"] is False
    assert list(result["stuck"]) == ["BTC-USD"]
    with pytest.raises(registry.PromotionRefusedError, match="stuck"):
        registry.promote(settings(), own.lake, version, result)


def test_a_probability_that_is_no_number_ends_a_dry_run(
    published: tuple[Any, str], recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, version = published
    monkeypatch.setattr(Checkpoint, "predict", lambda _self, _rows: float("nan"))

    with pytest.raises(PredictionError, match=r"BTC-USD: the model of run run-1 gives nan at 2025-05-29T00:10:00\+00:00"):
        runtime.run(settings(), own.lake, "dryrun", 5, version, source=recorded)


def test_a_frame_with_other_features_is_refused_by_name(published: tuple[Any, str], recorded: Any) -> None:
    own, version = published
    model = registry.load_model(settings(), own.lake, version, "BTC-USD")
    features = live_features(settings().symbol("BTC-USD"), MarketAt(recorded, AT), AT, 1500)

    with pytest.raises(AlignmentError, match=r"72 features, the checkpoint 73 .*three counts.*missing: rsi"):
        decide(model, features.drop(columns="rsi"), AT)
    swapped = features[[*features.columns[:-2], features.columns[-1], features.columns[-2]]]
    with pytest.raises(AlignmentError, match="the order differs"):
        decide(model, swapped, AT)


def test_no_decision_on_an_old_row_or_over_a_hole(published: tuple[Any, str], recorded: Any) -> None:
    own, version = published
    model = registry.load_model(settings(), own.lake, version, "ETH-USD")
    features = live_features(settings().symbol("ETH-USD"), MarketAt(recorded, AT), AT, 1500)

    assert 0 < decide(model, features, AT).probability < 1
    with pytest.raises(NoDecisionError, match=r"the newest row at .* is 2025-05-29T00:09:00\+00:00, expected"):
        decide(model, features, AT + MINUTE)
    with pytest.raises(NoDecisionError, match="there is a hole in them"):
        decide(model, features.drop(index=features.index[-20]), AT)
    with pytest.raises(NoDecisionError, match="59 rows"):
        decide(model, features.iloc[-59:], AT)


def test_a_minute_without_a_candle_is_skipped_and_said(published: tuple[Any, str], recorded: Any) -> None:
    own, version = published

    class Late:
        """The exchange has not served one minute yet."""

        hourly, daily = recorded.hourly, recorded.daily

        def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
            return recorded.candles(symbol, timeframe, start, end).filter(pl.col("timestamp") != AT + MINUTE)

    result = runtime.run(settings(), own.lake, "dryrun", 3, version, symbols=["ETH-USD"], source=Late())

    assert [p["at"] for p in result["predictions"]] == [AT.isoformat(), (AT + MINUTE).isoformat()]
    assert len(result["skipped"]) == 1
    assert result["skipped"][0].startswith("SMOKE no decision: ETH-USD: the newest row at 2025-05-29T00:12:00+00:00 is")


class TestLive:
    """Live mode: promoted, real models only, by the clock, with Telegram."""

    def test_refuses_a_smoke_model_even_when_promoted(self, published: tuple[Any, str], tmp_path: Path) -> None:
        own, version = published[0].copy(tmp_path), published[1]
        registry.promote(settings(), own.lake, version, evidence(version))

        with pytest.raises(RuntimeRefusedError, match=r"SMOKE .* live mode refuses it always"):
            runtime.run(settings(None), own.lake, "live", 1, symbols=["BTC-USD"])

    def test_refuses_as_of_and_a_version_on_trial(self, published: tuple[Any, str]) -> None:
        own, version = published
        with pytest.raises(RuntimeRefusedError, match=r"runtime\.as_of is 2025"):
            runtime.run(settings(), own.lake, "live", 1)
        with pytest.raises(RuntimeRefusedError, match="follows promoted models only"):
            runtime.run(settings(None), own.lake, "live", 1, version)

    def test_needs_champions_of_every_symbol(self, published: tuple[Any, str], real: tuple[Any, str]) -> None:
        with pytest.raises(RuntimeRefusedError, match="no model is promoted"):
            runtime.run(settings(None), published[0].lake, "live", 1)
        with pytest.raises(RuntimeRefusedError, match="no model of SOL-USD"):
            runtime.run(settings(None), real[0].lake, "live", 1)

    def test_decides_every_minute_and_tells_telegram(
        self, real: tuple[Any, str], recorded: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[str] = []
        monkeypatch.setattr(telegram, "send", lambda _settings, text: sent.append(text))
        chat = TelegramSettings(token=SecretStr("t"), chat_id="1")
        time = Minutes(AT - timedelta(seconds=1))

        result = runtime.run(
            settings(None, telegram=chat),
            real[0].lake,
            "live",
            2,
            symbols=["BTC-USD", "ETH-USD"],
            clock=time.clock,
            sleep=time.sleep,
            source=recorded,
        )

        assert (result["not_stuck"], result["smoke"], len(result["predictions"])) == (True, False, 4)
        assert len(sent) == 2
        assert sent[0].splitlines()[0] == "2025-05-29 00:10 UTC"
        assert sent[0].splitlines()[1].startswith("BTC-USD: ")

    def test_a_failing_exchange_does_not_end_the_loop(self, real: tuple[Any, str], recorded: Any) -> None:
        class Away:
            hourly, daily = recorded.hourly, recorded.daily
            failures = 1

            def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
                if self.failures:
                    self.failures -= 1
                    raise MarketDataError("Coinbase: 503")
                return recorded.candles(symbol, timeframe, start, end)

        time = Minutes(AT - timedelta(seconds=1))
        result = runtime.run(
            settings(None), real[0].lake, "live", 3, symbols=["ETH-USD"], clock=time.clock, sleep=time.sleep, source=Away()
        )

        assert len(result["predictions"]) == 2
        assert result["skipped"] == ["ETH-USD: no decision at 2025-05-29T00:10:00+00:00: Coinbase: 503"]

    def test_a_lake_out_of_reach_for_a_moment_does_not_end_the_loop(
        self, real: tuple[Any, str], recorded: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Away(Lake):
            reads = 0

            def read(self, key: str) -> bytes:
                if key == keys.promoted("models"):
                    self.reads += 1
                    if self.reads == 3:
                        raise LakeError("s3://b/models/promoted.json: Connect timeout")
                return super().read(key)

        time = Minutes(AT - timedelta(seconds=1))
        lake = Away(real[0].lake.root)
        result = runtime.run(
            settings(None), lake, "live", 3, symbols=["ETH-USD"], clock=time.clock, sleep=time.sleep, source=recorded
        )

        assert lake.reads == 4, "at the start and in every round"
        assert len(result["predictions"]) == 3
        assert "the loaded ones go on: LakeError: s3://b/models/promoted.json: Connect timeout" in caplog.text

    def test_a_model_that_answers_with_no_number_does_not_end_the_loop(
        self, real: tuple[Any, str], recorded: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = iter([float("nan"), 0.6, 0.7])
        monkeypatch.setattr(Checkpoint, "predict", lambda _self, _rows: next(answers))
        time = Minutes(AT - timedelta(seconds=1))
        result = runtime.run(
            settings(None), real[0].lake, "live", 3, symbols=["ETH-USD"], clock=time.clock, sleep=time.sleep, source=recorded
        )

        assert [p["probability"] for p in result["predictions"]] == [0.6, 0.7]
        assert "gives nan at 2025-05-29T00:10:00+00:00" in result["skipped"][0]


class TestCommands:
    """``crpbot models`` and ``crpbot runtime``, as an operator types them."""

    @pytest.fixture
    def crpbot(self, published: tuple[Any, str], recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        own = published[0].copy(tmp_path)
        monkeypatch.setenv("CRPBOT_LAKE", own.lake.root)
        monkeypatch.setenv("CRPBOT_PROMOTION__ALLOW_SMOKE", "true")
        monkeypatch.setattr(loop, "MarketData", lambda *_args, **_options: recorded)
        return lambda *arguments: CliRunner().invoke(cli.app, list(arguments))

    def test_a_dry_run_prints_its_lines(self, crpbot: Any, published: tuple[Any, str]) -> None:
        done = crpbot("runtime", "--mode", "dryrun", "--iterations", "2", "--model", published[1], "--at", AT.isoformat())

        assert done.exit_code == 0, done.stderr
        assert len(done.stdout.splitlines()) == 4
        assert all(line.startswith("SMOKE ") and "(LSTM: 0." in line for line in done.stdout.splitlines())

    def test_json_is_the_record_alone(self, crpbot: Any, published: tuple[Any, str]) -> None:
        arguments = ("--mode", "dryrun", "--iterations", "1", "--model", published[1], "--at", AT.isoformat(), "--json")
        done = crpbot("runtime", *arguments, "--symbols", "ETH-USD")

        assert json.loads(done.stdout)["models"] == {"ETH-USD": published[1]}

    def test_live_is_refused_on_stderr(self, crpbot: Any) -> None:
        done = crpbot("runtime", "--mode", "live", "--iterations", "1")

        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("error: no model is promoted")

    def test_stuck_predictions_exit_with_1(self, crpbot: Any, published: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Checkpoint, "predict", lambda _self, _rows: 0.5)
        done = crpbot("runtime", "--mode", "dryrun", "--iterations", "2", "--model", published[1], "--at", AT.isoformat())

        assert done.exit_code == 1
        assert "stuck at 50 %" in done.stderr

    def test_models_are_listed_shown_verified_promoted(
        self, crpbot: Any, published: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version = published[1]
        monkeypatch.setenv("CRPBOT_RUNTIME__AS_OF", AT.isoformat())

        listed = json.loads(crpbot("models", "list", "--json").stdout)
        assert [(v["version"], v["promoted"]) for v in listed] == [(version, [])]
        shown = crpbot("models", "show", version)
        assert "input_size 73" in shown.stdout
        assert all(line.startswith("SMOKE ") for line in shown.stdout.splitlines())
        assert "BTC-USD: features file 73, run time 73, checkpoint 73" in crpbot("models", "verify", version).stdout
        promoted = crpbot("models", "promote", version)
        assert promoted.stdout.startswith(f"SMOKE version {version} promoted"), promoted.stderr
        assert json.loads(crpbot("models", "list", "--json").stdout)[0]["promoted"] == ["BTC-USD", "ETH-USD"]
        assert json.loads(crpbot("models", "diff", version, version, "--json").stdout)["changed"] == {}
        rolled = crpbot("models", "rollback")
        assert (rolled.exit_code, rolled.stdout) == (1, "")
        assert "nothing to roll back to" in rolled.stderr

    def test_an_unknown_version_is_an_error_on_stderr(self, crpbot: Any) -> None:
        done = crpbot("models", "verify", "nope")

        assert done.exit_code == 1
        assert "no model version 'nope'" in done.stderr


def test_predict_refuses_what_it_was_not_made_for(published: tuple[Any, str]) -> None:
    model = registry.load_model(settings(), published[0].lake, published[1], "ETH-USD")
    rows = np.zeros((60, 54), dtype=np.float32)

    assert 0 < model.predict(rows) < 1
    with pytest.raises(ValueError, match=r"a window of shape \(59, 54\) where the model takes \(60, 54\)"):
        model.predict(rows[1:])
    rows[3, 2] = np.nan
    with pytest.raises(ValueError, match=f"infinite in {catalog.feature_names('ETH-USD')[2]}"):
        model.predict(rows)
