"""A real HTTP server on loopback that speaks Coinbase's and CoinGecko's wire formats, for the tests that fetch."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import parse_qs, urlsplit

import polars as pl
import pytest

from crpbot_lib import training
from crpbot_lib.config import TIMEFRAMES, settings
from crpbot_lib.features import catalog, engineer_features
from crpbot_lib.lake import Lake, keys
from crpbot_lib.sandbox.data import FolderSource
from crpbot_lib.sandbox.synthetic import SyntheticSource

WIDTHS = {"ONE_MINUTE": ("1m", 60), "FIVE_MINUTE": ("5m", 300), "FIFTEEN_MINUTE": ("15m", 900), "ONE_HOUR": ("1h", 3600)}
Point = tuple[int, float | None, float | None, float | None]
Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Request:
    path: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class Wire:
    """What the server serves and what it was asked. ``script`` holds answers that are given before the real ones."""

    url: str = ""
    candles: dict[tuple[str, str], pl.DataFrame] = field(default_factory=dict)
    points: dict[tuple[str, str], list[Point]] = field(default_factory=dict)
    """(coin, "hourly" or "daily") -> (UNIX ms, price, cap, volume), in the order they are served."""
    now_point: Point | None = None
    """Appended to every range that reaches beyond it, as CoinGecko does."""
    end_is_inclusive: bool = True
    script: deque[Answer] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)

    def says(self, status: int, body: Any, **headers: str) -> None:
        """The next answer is this one; ``_`` in a header's name stands for ``-``."""
        text = body if isinstance(body, str) else json.dumps(body)

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", str(len(text.encode())))
            handler.end_headers()
            handler.wfile.write(text.encode())

        self.script.append(answer)

    def answer(self, request: Request) -> tuple[int, Any]:
        if "/market/products/" in request.path:
            return self._candles(request)
        if request.path.endswith("/market_chart/range"):
            return self._range(request)
        return 404, {"message": "NotFound"}

    def _candles(self, request: Request) -> tuple[int, Any]:
        symbol, query = request.path.split("/")[-2], request.query
        timeframe, width = WIDTHS[query["granularity"]]
        start, end = int(query["start"]), int(query["end"])
        if (end - start) // width + 1 > 350:
            return 400, {"error": "INVALID_ARGUMENT", "message": "number of candles requested should be less than 350"}
        if (symbol, timeframe) not in self.candles:
            return 404, {"error": "NOT_FOUND", "message": f"Product {symbol} not supported"}
        closed = "both" if self.end_is_inclusive else "left"
        frame = self.candles[symbol, timeframe].with_columns(pl.col("timestamp").dt.epoch("s").alias("start"))
        rows = frame.filter(pl.col("start").is_between(start, end, closed=closed)).sort("start", descending=True)
        names = ("start", "low", "high", "open", "close", "volume")
        return 200, {"candles": [{name: str(row[name]) for name in names} for row in rows.iter_rows(named=True)]}

    def _range(self, request: Request) -> tuple[int, Any]:
        coin, query = request.path.split("/")[-3], request.query
        first, last = int(query["from"]) * 1000, int(query["to"]) * 1000
        # as CoinGecko chooses where no interval is named
        series = query.get("interval") or ("daily" if last - first > 90 * 86_400_000 else "hourly")
        if (coin, series) not in self.points:
            return 404, {"error": "coin not found"}
        points = [p for p in self.points[coin, series] if first <= p[0] <= last]
        if self.now_point and first <= self.now_point[0] <= last:
            points = [p for p in points if p[0] <= self.now_point[0]] + [self.now_point]
        names = ("prices", "market_caps", "total_volumes")
        return 200, {name: [[p[0], p[i + 1]] for p in points] for i, name in enumerate(names)}


@pytest.fixture
def wire() -> Iterator[Wire]:
    """The server, with nothing to serve yet."""
    state = Wire()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # headers and body are two writes; Nagle would hold the second back for 40 ms
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            request = Request(parts.path, query, {name.lower(): value for name, value in self.headers.items()})
            state.requests.append(request)
            if state.script:
                state.script.popleft()(self)
                return
            status, body = state.answer(request)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Cache-Control", "public, max-age=300")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def minutes(market_data_dir: Path | None) -> pl.DataFrame:
    """1m candles of 2025-05-05 to 2025-05-09 without a gap: real ones where the folder is there, else a random walk."""
    start, end = datetime(2025, 5, 5, tzinfo=UTC), datetime(2025, 5, 9, tzinfo=UTC)
    if market_data_dir is not None:
        real = pl.read_parquet(market_data_dir / "candles_1m" / "BTC-USD.parquet")
        return real.filter(pl.col("timestamp").is_between(start, end, closed="left"))
    rng = random.Random(7)
    rows, price = [], 95_000.0
    for n in range((end - start) // timedelta(minutes=1)):
        opened, price = price, price * (1 + rng.gauss(0, 0.0004))
        high, low = max(opened, price) + rng.random(), min(opened, price) - rng.random()
        rows.append((start + n * timedelta(minutes=1), opened, high, low, price, rng.random() * 20))
    names = {"timestamp": pl.Datetime("us", "UTC"), **dict.fromkeys(("open", "high", "low", "close", "volume"), pl.Float64)}
    return pl.DataFrame(rows, schema=names, orient="row")


@pytest.fixture(scope="session")
def timeframes(minutes: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """The same days at every timeframe."""
    value = (pl.first("open"), pl.max("high"), pl.min("low"), pl.last("close"), pl.sum("volume"))
    wider = {tf: minutes.group_by_dynamic("timestamp", every=tf).agg(*value) for tf in ("5m", "15m", "1h")}
    return {"1m": minutes, **wider}


class Recorded:
    """A ``DataFetcher`` over recorded series (real ones where they are at hand), which counts what it was asked."""

    LAG: ClassVar = {"hourly": timedelta(minutes=5), "daily": timedelta(minutes=35)}

    def __init__(self, source: FolderSource | SyntheticSource) -> None:
        self.source = source
        self.asked: list[tuple[str, str]] = []

    def candles(self, symbol: str, timeframe: str, start: datetime, end: datetime) -> pl.DataFrame:
        return self._slice(self.source.candles(symbol, timeframe), (timeframe, symbol), start, end)

    def hourly(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        return self._points("hourly", coin, start, end)

    def daily(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        return self._points("daily", coin, start, end)

    def _points(self, series: Literal["hourly", "daily"], coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        frame = self._slice(self.source.points(coin, series), (series, coin), start, end)
        known = (pl.col("timestamp") + self.LAG[series]).alias("available_at")
        return frame.select("timestamp", known, "price", "market_cap", "total_volume")

    def _slice(self, frame: pl.DataFrame | None, asked: tuple[str, str], start: datetime, end: datetime) -> pl.DataFrame:
        self.asked.append(asked)
        assert frame is not None, f"nothing is recorded of {asked}"
        return frame.filter(pl.col("timestamp").is_between(start, end, closed="left"))


@dataclass(frozen=True)
class TrainedLake:
    """A lake with features of BTC-USD (73) and ETH-USD (54) and the models that a smoke run has trained on them."""

    lake: Lake
    run: str
    version: str
    """Of the features."""
    end: datetime
    """Where the features end and a dry run may begin."""

    def copy(self, folder: Path) -> TrainedLake:
        """A lake of its own, to spoil."""
        shutil.copytree(self.lake.root.removeprefix("file://"), folder, dirs_exist_ok=True)
        return replace(self, lake=Lake(f"file://{folder}"))


@pytest.fixture(scope="session")
def recorded(market_data_dir: Path | None) -> Recorded:
    """Real market data where the folder is there, else generated data that says it is synthetic."""
    return Recorded(FolderSource(market_data_dir) if market_data_dir else SyntheticSource())


@pytest.fixture(scope="session")
def features_lake(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> TrainedLake:
    """The features of three days, with the manifest that the gate would write, and a smoke job that has not run."""
    lake = Lake(f"file://{tmp_path_factory.mktemp('features')}")
    start, end, warm_up = datetime(2025, 5, 26, tzinfo=UTC), datetime(2025, 5, 29, tzinfo=UTC), timedelta(days=1)
    version = "v-test"
    entries: dict[str, Any] = {}
    for name in ("BTC-USD", "ETH-USD"):
        symbol = settings().symbol(name)
        candles = {tf: recorded.candles(name, tf, start - warm_up, end) for tf in TIMEFRAMES}
        points = {
            "hourly": recorded.hourly(symbol.coin, start - 18 * warm_up, end),
            "daily": recorded.daily(symbol.coin, datetime(2013, 1, 1, tzinfo=UTC), end),
            "all_time_high": None,
        }
        frame = engineer_features(name, candles, points).filter(pl.col("timestamp") >= start)
        key = keys.features(version, name)
        lake.write_frame(key, frame)
        names = catalog.feature_names(name)
        entries[name] = {
            "rows": frame.height,
            "features": len(names),
            "names": names,
            "hash": catalog.catalog_hash(symbol.feature_groups),
            "sha256": hashlib.sha256(lake.read(key)).hexdigest(),
            "key": key,
        }
        sidecar = {"version": version, "symbol": name, "sha256": entries[name]["sha256"], "filled": [], "outages": []}
        lake.write_json(keys.features_sidecar(version, name), sidecar)
    manifest = {"version": version, "start": "2025-05-26", "end": "2025-05-29", "catalog": "all", "symbols": entries}
    lake.write_json(keys.features_manifest(version), manifest)
    spec = training.job_spec(settings(), lake, "run-1", version, list(entries), smoke=True)
    training.write_job(lake, spec)
    return TrainedLake(lake, "run-1", version, end)


@pytest.fixture(scope="session")
def trained_lake(features_lake: TrainedLake, tmp_path_factory: pytest.TempPathFactory) -> TrainedLake:
    """The same after a real training of a few steps on the CPU. Not to be written to: take a ``copy``."""
    from crpbot_lib.training import job

    trained = features_lake.copy(tmp_path_factory.mktemp("trained"))
    job.run(trained.lake, trained.run, generation=1)
    return trained
