"""What is stored equals what was recorded, bit by bit, whatever the exchange does and whenever the process is killed.

Every folder of recorded candles is served by the local exchange with faults switched on, loaded into a lake, and compared with the
recording's own parquet files, which are read here without any help of the exchange. Without the folder the candles are generated.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from crpbot_lib.config import TIMEFRAME_SECONDS, TIMEFRAMES, Settings
from crpbot_lib.lake import Lake
from crpbot_lib.market_data import MarketData, MarketDataError
from crpbot_lib.sandbox import processes
from crpbot_lib.sandbox.beside import CloudBeside
from crpbot_lib.sandbox.server import default_data_dir
from crpbot_lib.sandbox.synthetic import SyntheticSource
from crpbot_lib.steps import ingest

pytestmark = pytest.mark.timeout(600)

PATIENCE = 0.5
"""Seconds that the client waits for a byte here."""
FAULTS = [
    {"status": 429, "rate": 0.10},
    {"status": 503, "rate": 0.03},
    {"stall": 2 * PATIENCE, "rate": 0.02},
    {"truncate": True, "rate": 0.03},
    {"empty": True, "rate": 0.02},
    {"error_body": True, "rate": 0.01},
    {"html": True, "rate": 0.01},
]
KILLS = 10
KILLED_DAYS = 12

VALUES = ("open", "high", "low", "close", "volume")
Series = dict[tuple[str, str], pl.DataFrame]
"""(symbol, timeframe) -> its candles."""

DATA = default_data_dir()
VENUES = sorted({str(file.parent.relative_to(DATA)) for file in DATA.glob("candles*/**/*.parquet")}) if DATA else ["synthetic"]
KILLED_VENUE = "candles_1m_windows/binance_spot_2023-03" if DATA else "synthetic"
"""Three symbols, wider candles of their own, an outage."""
ELSEWHERE = {"candles_1m": "binance_perp_2025-05", "candles_1m_spot": "binance_spot_2025-05"}
"""Where a venue's wider candles are, if not under its own name; the README of the folder says so."""


@dataclass
class Totals:
    """What the suite did, for its last words."""

    venues: int = 0
    rows: int = 0
    partitions: int = 0
    requests: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    kills: int = 0
    leftovers: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0

    def lines(self) -> list[str]:
        faults = ", ".join(f"{name.partition(':')[2]} {count:,}" for name, count in sorted(self.injected.items()))
        return [
            f"{self.venues} folders of {'recorded' if DATA else 'SYNTHETIC'} candles, {self.requests:,} requests, "
            f"{self.injected.total():,} faults injected: {faults}",
            f"{self.kills} times killed with SIGKILL ({self.leftovers} unfinished files left, none of them a key), "
            f"{self.resumed} loads resumed after a request had failed too often",
            f"{self.rows:,} stored candles in {self.partitions:,} partitions compared bit by bit: "
            f"{self.lost} lost, {self.doubled} doubled, {self.different} different",
        ]


@pytest.fixture(scope="module")
def totals(proof: list[str]) -> Iterator[Totals]:
    totals = Totals()
    yield totals
    proof.extend(totals.lines())


@pytest.fixture(scope="module")
def exchange() -> Iterator[CloudBeside]:
    """In a process of its own: it goes on when a client is killed."""
    with CloudBeside() as cloud:
        yield cloud


@pytest.mark.parametrize("venue", VENUES)
def test_every_candle_that_is_served_is_stored_whatever_the_exchange_does(
    venue: str, exchange: CloudBeside, tmp_path: Path, totals: Totals
) -> None:
    recorded, resampled = _recorded(venue), _resampled(venue)
    _serve(exchange, venue)
    settings = Settings(
        coinbase_url=exchange.env["CRPBOT_COINBASE_URL"],
        coinbase_requests_per_second=100_000,
        http_timeout_seconds=PATIENCE,
        rate_limit_dir=str(tmp_path),
    )
    lake = Lake(f"file://{tmp_path}/lake")
    for symbol in sorted({symbol for symbol, _ in recorded}):
        # of a venue without minutes only what was recorded is asked for
        timeframes = [tf for tf in TIMEFRAMES if (symbol, tf) in recorded or (symbol, tf) in resampled]
        _load(settings, lake, symbol, timeframes, *_days(recorded, symbol), totals)
    _count(exchange, totals)
    _compare(tmp_path / "lake", recorded, resampled, totals)
    totals.venues += 1


def test_a_load_that_is_killed_again_and_again_stores_the_same_bytes_as_one_that_is_not(
    exchange: CloudBeside, tmp_path: Path, totals: Totals
) -> None:
    recorded, resampled = _recorded(KILLED_VENUE), _resampled(KILLED_VENUE)
    symbols = sorted({symbol for symbol, _ in recorded})
    # whole days: before the first candle pages are empty, and asked for again with the pauses of production
    start = _days(recorded, symbols[0])[0] + timedelta(days=1)
    end = start + timedelta(days=KILLED_DAYS)
    recorded, resampled = _within(start, end, recorded), _within(start, end, resampled)
    _serve(exchange, KILLED_VENUE)
    command = [str(Path(sys.executable).with_name("crpbot")), "fetch", "all", "--start", str(start), "--end", str(end)]
    command += [argument for symbol in symbols for argument in ("--symbol", symbol)]

    def run_to(lake: Path, kill: Callable[[], None] | None = None) -> int:
        """The command's exit status; it is killed, if need be, when ``kill`` returns, at some moment after its first request."""
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("CRPBOT_", "AWS_"))},
            **exchange.env,
            "CRPBOT_LAKE": f"file://{lake}",
            "CRPBOT_COINBASE_REQUESTS_PER_SECOND": "100000",
            "CRPBOT_COINGECKO_REQUESTS_PER_SECOND": "100000",
            "CRPBOT_HTTP_TIMEOUT_SECONDS": str(PATIENCE),
            "CRPBOT_RATE_LIMIT_DIR": str(tmp_path),
        }
        asked = _asked(exchange)
        with (tmp_path / "output").open("ab") as out:
            process = processes.spawn(command, env=env, stdout=out, stderr=out)
        try:
            if kill is not None:
                while process.poll() is None and _asked(exchange) == asked:
                    time.sleep(0.01)
                kill()
                process.kill()
            return process.wait(timeout=120)
        finally:
            processes.end_group(process.pid, grace=0)

    rng = random.Random(1)
    lake = tmp_path / "lake"

    def while_fetching() -> None:
        time.sleep(rng.uniform(0, 1))

    def while_writing() -> None:
        enough, until = _stored(lake) + rng.randint(1, 12), time.monotonic() + 60
        while _stored(lake) < enough and time.monotonic() < until:
            time.sleep(0.005)

    killed = [run_to(lake, kill) for _ in range(KILLS // 2) for kill in (while_fetching, while_writing)]
    assert killed == [-9] * KILLS, (tmp_path / "output").read_text()[-2000:]
    assert run_to(lake) == 0, (tmp_path / "output").read_text()[-2000:]
    totals.kills += len(killed)
    totals.leftovers += sum(1 for _ in lake.rglob("*.part"))
    _count(exchange, totals)
    _compare(lake, recorded, resampled, totals)

    exchange.tell("faults", {"exchange": None})
    assert run_to(tmp_path / "undisturbed") == 0, (tmp_path / "output").read_text()[-2000:]
    stored, undisturbed = Lake(f"file://{lake}"), Lake(f"file://{tmp_path}/undisturbed")
    assert stored.keys("raw/") == undisturbed.keys("raw/")
    assert [key for key in undisturbed.keys("raw/") if stored.read(key) != undisturbed.read(key)] == []


def _serve(exchange: CloudBeside, venue: str) -> None:
    exchange.start(**({"data_dir": DATA, "venue": venue} if DATA else {}))
    exchange.tell("faults", {"exchange": FAULTS})


def _load(settings: Settings, lake: Lake, symbol: str, timeframes: list[str], start: date, end: date, totals: Totals) -> None:
    """Goes on where a request has failed too often, as a task's retry does."""
    market = MarketData(settings, backoff=0.01)
    for attempt in range(5):
        try:
            ingest.load(settings, lake, symbol, start, end, timeframes=timeframes, coingecko=False, market=market)
        except MarketDataError as error:
            if error.permanent or attempt == 4:
                raise
            totals.resumed += 1
        else:
            return


def _count(exchange: CloudBeside, totals: Totals) -> None:
    totals.requests += exchange.ask("requests")["exchange"]["requests"]
    totals.injected.update(exchange.ask("faults")["injected"])


def _asked(exchange: CloudBeside) -> int:
    return int(exchange.ask("requests")["exchange"]["requests"])


def _stored(lake: Path) -> int:
    return sum(1 for _ in lake.rglob("*.parquet"))


# what was recorded, read from the files


def _recorded(venue: str) -> Series:
    """What the folder's own files hold."""
    if DATA is None:
        source = SyntheticSource()
        found = {(symbol.name, tf): source.candles(symbol.name, tf) for symbol in Settings().symbols for tf in TIMEFRAMES}
        return {series: frame for series, frame in found.items() if frame is not None}
    return _files(DATA / venue)


def _files(folder: Path) -> Series:
    pieces: dict[tuple[str, str], list[pl.DataFrame]] = {}
    for file in sorted(folder.glob("*.parquet")):
        symbol, _, rest = file.stem.partition("_")
        pieces.setdefault((symbol, rest.partition("_")[0] or "1m"), []).append(pl.read_parquet(file))
    return {series: pl.concat(found).sort("timestamp") for series, found in pieces.items()}


def _resampled(venue: str) -> Series:
    """The wider candles that the folder itself does not hold: another folder's recording, and around it sums of its minutes."""
    if DATA is None:
        return {}
    minutes = {symbol: frame for (symbol, timeframe), frame in _files(DATA / venue).items() if timeframe == "1m"}
    elsewhere = _files(DATA / "candles_mtf" / ELSEWHERE.get(venue, Path(venue).name))
    found: Series = {}
    for symbol, frame in minutes.items():
        for timeframe in ("5m", "15m", "1h"):
            wider = _added_up(frame, TIMEFRAME_SECONDS[timeframe])
            if (apart := elsewhere.get((symbol, timeframe))) is not None:
                inside = pl.col("timestamp").is_between(apart["timestamp"][0], apart["timestamp"][-1])
                wider = pl.concat([wider.filter(~inside), apart]).sort("timestamp")
            found[symbol, timeframe] = wider
    return found


def _added_up(minutes: pl.DataFrame, width: int) -> pl.DataFrame:
    """Candles of ``width`` seconds; a bucket that reaches beyond the minutes' ends is not known."""
    opens = minutes["timestamp"].dt.epoch("s").to_numpy()
    firsts = np.flatnonzero(np.diff(opens // width, prepend=-1))
    lasts = np.append(firsts[1:], opens.size) - 1
    column = {name: minutes[name].to_numpy() for name in VALUES}
    buckets = opens[firsts] // width * width
    frame = pl.DataFrame(
        {
            "timestamp": pl.Series(buckets * 1_000_000).cast(pl.Datetime("us", "UTC")),
            "open": column["open"][firsts],
            "high": np.maximum.reduceat(column["high"], firsts),
            "low": np.minimum.reduceat(column["low"], firsts),
            "close": column["close"][lasts],
            "volume": np.add.reduceat(column["volume"], firsts),
        }
    )
    return frame.filter(pl.Series((buckets >= opens[0]) & (buckets + width <= opens[-1] + 60)))


def _days(series: Series, symbol: str) -> tuple[date, date]:
    """[first, after the last) UTC day of all that there is of a symbol."""
    stamps = [frame["timestamp"] for (name, _), frame in series.items() if name == symbol]
    return min(s[0] for s in stamps).date(), max(s[-1] for s in stamps).date() + timedelta(days=1)


def _within(start: date, end: date, series: Series) -> Series:
    inside = pl.col("timestamp").dt.date().is_between(start, end, closed="left")
    return {name: frame.filter(inside) for name, frame in series.items()}


# what is stored


def _compare(lake: Path, recorded: Series, resampled: Series, totals: Totals) -> None:
    stored = {
        (folder.name.removeprefix("symbol="), folder.parent.name): _partitions(folder, totals)
        for folder in (lake / "raw" / "candles").glob("*/symbol=*")
    }
    assert stored.keys() == recorded.keys() | resampled.keys()
    for series, expected in {**resampled, **recorded}.items():
        found = stored[series]
        lost = expected.join(found, on="timestamp", how="anti").height
        doubled = found.height - found["timestamp"].n_unique()
        totals.lost, totals.doubled, totals.rows = totals.lost + lost, totals.doubled + doubled, totals.rows + found.height
        assert (series, lost, doubled) == (series, 0, 0)
        assert found["timestamp"].equals(expected["timestamp"]), f"{series}: candles that nobody recorded"
        different = _different(found, expected, exact=series in recorded)
        totals.different += sum(different.values())
        assert (series, different) == (series, {})


def _partitions(folder: Path, totals: Totals) -> pl.DataFrame:
    """All partitions of one series, each holding its own day only, one for every day between the first and the last."""
    frames = {date.fromisoformat(file.parent.name[5:]): pl.read_parquet(file) for file in sorted(folder.glob("date=*/*.parquet"))}
    days = list(frames)
    assert days == [days[0] + timedelta(days=n) for n in range(len(days))]
    for day, frame in frames.items():
        assert set(frame["timestamp"].dt.date().unique()) <= {day}
    totals.partitions += len(frames)
    return pl.concat(frames.values())


def _different(found: pl.DataFrame, expected: pl.DataFrame, exact: bool) -> Mapping[str, int]:
    """Rows a column whose bits differ. Sums of volumes may differ in rounding, where they were not recorded but added up here."""
    wrong = {}
    for name in VALUES:
        stored, recorded = found[name].to_numpy(), expected[name].to_numpy()
        same = stored.view(np.uint64) == recorded.view(np.uint64)
        if name == "volume" and not exact:
            same |= np.isclose(stored, recorded, rtol=1e-12, atol=0)
        wrong[name] = int((~same).sum())
    return {name: count for name, count in wrong.items() if count}
