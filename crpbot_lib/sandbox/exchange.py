"""The exchange's stand-in: Coinbase Advanced Trade's public candles and product endpoints, in its wire format.

Error bodies are those quoted from the real endpoint; match on the status and the text, as a client must there.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
from werkzeug.wrappers import Request, Response

from crpbot_lib.config import TIMEFRAME_SECONDS, Timeframe
from crpbot_lib.sandbox.data import Source

MAX_CANDLES = 350
GRANULARITIES: dict[str, Timeframe] = {
    "ONE_MINUTE": "1m",
    "FIVE_MINUTE": "5m",
    "FIFTEEN_MINUTE": "15m",
    "ONE_HOUR": "1h",
}
NO_CANDLES: dict[str, Any] = {"candles": []}
ERROR_BODY = {"errors": [{"id": "internal_server_error", "message": "Internal server error"}]}
"""An error in the documented shape; with status 200 it is a fault."""
_NAMES = {"BTC": "Bitcoin", "ETH": "Ethereum", "SOL": "Solana"}


def _json(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body), status, {"Cache-Control": "no-store"}, content_type="application/json; charset=utf-8")


def _error(status: int, code: str, message: str) -> Response:
    return _json({"error": code, "error_details": message, "message": message}, status)


def _number(value: Any) -> str:
    """As the exchange writes numbers: in full, no exponent, no trailing zero."""
    return np.format_float_positional(float(value), trim="-")


def rate_limited() -> Response:
    """429 as documented: no Retry-After."""
    return _json({"errors": [{"id": "rate_limit_exceeded", "message": "Too many requests"}]}, 429)


@dataclass(frozen=True)
class _Series:
    """One series, ascending: the opening times in UNIX seconds, and each candle as JSON."""

    opens: np.ndarray[Any, np.dtype[np.int64]]
    rows: list[str]


def _texts(values: pl.Series) -> pl.Series:
    """``_number`` of a whole column."""
    texts = values.cast(pl.String)
    if texts.str.contains("e", literal=True).any():
        texts = pl.Series([_number(value) if "e" in text else text for value, text in zip(values, texts, strict=True)])
    return texts.str.strip_suffix(".0")


def render(frame: pl.DataFrame) -> list[str]:
    """The candles of ``frame`` as the JSON objects of the answer, each value a string that reads back as the same number."""
    starts = frame["timestamp"].dt.epoch("s").cast(pl.String)
    prices = [_texts(frame[name]) for name in ("low", "high", "open", "close", "volume")]
    return [
        f'{{"start":"{start}","low":"{low}","high":"{high}","open":"{open_}","close":"{close}","volume":"{volume}"}}'
        for start, low, high, open_, close, volume in zip(starts, *prices, strict=True)
    ]


class Exchange:
    """The stand-in over one source; answers are cut from series that are rendered once. Thread-safe.

    ``now`` (timezone-aware) is the present: nothing later is served, and the candle that is open then is served as it looks so
    far: all prices its opening price, and the share of its volume. None: everything is in the past.
    """

    def __init__(self, source: Source, now: datetime | None = None) -> None:
        self.source = source
        self._now = now
        self._rendered: dict[tuple[str, str], _Series] = {}
        self._lock = threading.Lock()

    def candles(self, product: str, request: Request) -> Response:
        """GET …/products/{product}/candles?start=&end=&granularity=&limit= : ``start`` and ``end`` are UNIX seconds, inclusive."""
        granularity = request.args.get("granularity", "")
        timeframe = GRANULARITIES.get(granularity)
        if timeframe is None:
            known = ", ".join(GRANULARITIES)
            return _error(400, "INVALID_ARGUMENT", f"granularity argument is invalid: {granularity!r} (this stand-in has {known})")
        try:
            start, end = int(request.args["start"]), int(request.args["end"])
            limit = int(request.args.get("limit", MAX_CANDLES))
        except (KeyError, ValueError):
            return _error(400, "INVALID_ARGUMENT", "start and end argument is invalid - UNIX seconds expected")
        series = self._series(product, timeframe)
        if series is None:
            return _error(404, "NOT_FOUND", f"Product {product} not supported")
        if end < start:
            return _error(400, "INVALID_ARGUMENT", "start and end argument is invalid - start is after end")
        width = TIMEFRAME_SECONDS[timeframe]
        asked = end // width - -(-start // width) + 1
        if asked > MAX_CANDLES or not 1 <= limit <= MAX_CANDLES:
            return _error(
                400,
                "INVALID_ARGUMENT",
                f"start and end argument is invalid - number of candles requested should be less than {MAX_CANDLES}",
            )
        first, stop = (int(i) for i in np.searchsorted(series.opens, (start, end + 1)))
        rows = series.rows[max(first, stop - limit) : stop]
        body = f'{{"candles":[{",".join(reversed(rows))}]}}'
        headers = {"Cache-Control": "no-store", "X-Sandbox-Data": self.source.kind_of(product)}
        return Response(body, 200, headers, content_type="application/json; charset=utf-8")

    def product(self, product: str) -> Response:
        """GET …/products/{product}: prices are those of the newest candle there is."""
        frames = (self._until_now(product, timeframe) for timeframe in GRANULARITIES.values())
        frame = next((f for f in frames if f is not None and not f.is_empty()), None)
        if frame is None:
            return _error(404, "NOT_FOUND", f"Product {product} not supported")
        response = _json(_product(product, frame))
        response.headers["X-Sandbox-Data"] = self.source.kind_of(product)
        return response

    def _series(self, product: str, timeframe: Timeframe) -> _Series | None:
        with self._lock:
            if (product, timeframe) not in self._rendered:
                frame = self._until_now(product, timeframe)
                if frame is None:
                    return None
                self._rendered[product, timeframe] = _Series(frame["timestamp"].dt.epoch("s").to_numpy(), render(frame))
            return self._rendered[product, timeframe]

    def _until_now(self, product: str, timeframe: Timeframe) -> pl.DataFrame | None:
        frame, now = self.source.candles(product, timeframe), self._now
        if frame is None or now is None:
            return frame
        gone = (pl.lit(now) - pl.col("timestamp")).dt.total_microseconds() / (TIMEFRAME_SECONDS[timeframe] * 1_000_000)
        still_open = gone < 1
        return frame.filter(pl.col("timestamp") <= now).with_columns(
            *(pl.when(still_open).then(pl.col("open")).otherwise(pl.col(name)).alias(name) for name in ("high", "low", "close")),
            pl.when(still_open).then(pl.col("volume") * gone).otherwise(pl.col("volume")).alias("volume"),
        )


def _product(product: str, frame: pl.DataFrame) -> dict[str, Any]:
    last = frame["close"][-1]
    day = frame.filter(pl.col("timestamp") > frame["timestamp"][-1] - timedelta(days=1))
    base, quote = product.split("-")
    change = (last / day["open"][0] - 1) * 100
    return {
        "product_id": product,
        "price": _number(last),
        "price_percentage_change_24h": _number(change),
        "volume_24h": _number(day["volume"].sum()),
        "volume_percentage_change_24h": "",
        "base_increment": "0.00000001",
        "quote_increment": "0.01",
        "quote_min_size": "1",
        "quote_max_size": "150000000",
        "base_min_size": "0.00000001",
        "base_max_size": "3400",
        "base_name": _NAMES.get(base, base),
        "quote_name": "US Dollar",
        "watched": False,
        "is_disabled": False,
        "new": False,
        "status": "online",
        "cancel_only": False,
        "limit_only": False,
        "post_only": False,
        "trading_disabled": False,
        "auction_mode": False,
        "product_type": "SPOT",
        "quote_currency_id": quote,
        "base_currency_id": base,
        "fcm_trading_session_details": None,
        "mid_market_price": "",
        "alias": "",
        "alias_to": [],
        "base_display_symbol": base,
        "quote_display_symbol": quote,
        "view_only": False,
        "price_increment": "0.01",
        "display_name": product,
        "product_venue": "CBE",
        "approximate_quote_24h_volume": _number((day["volume"] * day["close"]).sum()),
    }
