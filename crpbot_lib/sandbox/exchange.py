"""The exchange's stand-in: Coinbase Advanced Trade's public candles and product endpoints, in its wire format.

Error bodies are those quoted from the real endpoint; match on the status and the text, as a client must there.
"""

from __future__ import annotations

import json
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


def candles(source: Source, product: str, request: Request) -> Response:
    """GET …/products/{product}/candles?start=&end=&granularity=&limit= : ``start`` and ``end`` are UNIX seconds, both inclusive."""
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
    frame = source.candles(product, timeframe)
    if frame is None:
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
    rows = frame.with_columns(pl.col("timestamp").dt.epoch("s")).filter(pl.col("timestamp").is_between(start, end)).tail(limit)
    listed = [
        {
            "start": str(row["timestamp"]),
            **{name: _number(row[name]) for name in ("low", "high", "open", "close", "volume")},
        }
        for row in rows.reverse().iter_rows(named=True)
    ]
    return _json({"candles": listed})


def product(source: Source, product: str) -> Response:
    """GET …/products/{product}: prices are those of the newest candle there is."""
    frame = source.candles(product, "1m")
    if frame is None:
        return _error(404, "NOT_FOUND", f"Product {product} not supported")
    last = frame["close"][-1]
    day = frame.tail(1440)
    base, quote = product.split("-")
    change = (last / day["open"][0] - 1) * 100
    return _json(
        {
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
    )
