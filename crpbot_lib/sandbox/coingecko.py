"""CoinGecko's stand-in: the pro API's market_chart/range and coin endpoints, in its wire format.

Without ``interval`` the real API chooses 5 minutes for a range within a day; there is no such series here, so hourly points come
instead. The all-time high is that of the daily prices, which is what the data knows.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Literal

import polars as pl
from werkzeug.wrappers import Request, Response

from crpbot_lib.sandbox.data import COINS, Series, Source

Plan = Literal["pro", "demo", "public"]
PRO_HEADER, DEMO_HEADER = "x-cg-pro-api-key", "x-cg-demo-api-key"
PRO_KEY, DEMO_KEY = "local-cloud-dummy-key", "local-cloud-dummy-demo-key"
KEYS: dict[Plan, str | None] = {"pro": PRO_KEY, "demo": DEMO_KEY, "public": None}
NO_POINTS: dict[str, Any] = {"prices": [], "market_caps": [], "total_volumes": []}
ERROR_BODY = {"status": 500, "error": "Internal Server Error"}
"""As recorded with status 500; with status 200 it is a fault."""
_NINETY_DAYS = 90 * 86400


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, content_type="application/json; charset=utf-8")


def rate_limited() -> Response:
    """429 with ``retry-after`` in seconds."""
    message = (
        "You've exceeded the Rate Limit. Please visit https://www.coingecko.com/en/api/pricing "
        "to subscribe to our API plans for higher rate limits."
    )
    return _json({"status": {"error_code": 429, "error_message": message}}, 429, {"retry-after": "1"})


def refuse_key(request: Request, plan: Plan) -> Response | None:
    """The answer to a key that does not fit ``plan``'s host.

    A key in the other plan's header (10010, 10011) is told in the shape that others report, with the status of their issues, 400.
    """
    pro, demo = request.headers.get(PRO_HEADER), request.headers.get(DEMO_HEADER)
    if plan == "pro" and pro is None and demo is not None:
        return _wrong_host(10011, "If you are using Demo API key, please change your root URL to api.coingecko.com")
    if plan != "pro" and pro is not None:
        return _wrong_host(10010, "If you are using Pro API key, please change your root URL to pro-api.coingecko.com")
    if {"pro": pro, "demo": demo, "public": None}[plan] == KEYS[plan]:
        return None
    return _json({"status": {"error_code": 10002, "error_message": "API Key Missing"}}, 401)


def _wrong_host(code: int, message: str) -> Response:
    return _json({"error_code": code, "status": {"error_message": message}}, 400)


def market_chart_range(source: Source, coin: str, request: Request) -> Response:
    """GET /coins/{coin}/market_chart/range?vs_currency=usd&from=&to=&interval= : UNIX seconds, both inclusive; nulls stay null."""
    for name in ("vs_currency", "from", "to"):
        if not request.args.get(name):
            return _json({"error": f"Missing parameter {name}"}, 422)
    if request.args["vs_currency"] != "usd":
        return _json({"error": "invalid vs_currency"}, 422)
    try:
        begin, end = float(request.args["from"]), float(request.args["to"])
    except ValueError:
        return _json({"error": "invalid date range: UNIX seconds expected"}, 422)
    interval = request.args.get("interval")
    if interval not in (None, "hourly", "daily"):
        return _json({"error": f"invalid interval {interval}: this stand-in has hourly and daily"}, 422)
    series: Series = "daily" if interval == "daily" or (interval is None and end - begin > _NINETY_DAYS) else "hourly"
    frame = source.points(coin, series)
    if frame is None:
        return _json({"error": "coin not found"}, 404)
    stamps = pl.col("timestamp").dt.epoch("ms")
    rows = frame.with_columns(stamps).filter(pl.col("timestamp").is_between(begin * 1000, end * 1000))
    body = {
        "prices": rows.select("timestamp", "price").rows(),
        "market_caps": rows.select("timestamp", "market_cap").rows(),
        "total_volumes": rows.select("timestamp", "total_volume").rows(),
    }
    derived = "; derived" if series == "hourly" else ""
    return _json(body, headers={"Cache-Control": "public, max-age=30", "X-Sandbox-Data": f"{source.kind}{derived}"})


def coin(source: Source, coin_id: str) -> Response:
    """GET /coins/{coin}: the fields around ``market_data.ath``."""
    frame = source.points(coin_id, "daily")
    if frame is None:
        return _json({"error": "coin not found"}, 404)
    high = frame.row(int(frame["price"].arg_max() or 0), named=True)
    low = frame.row(int(frame["price"].arg_min() or 0), named=True)
    last = frame.row(-1, named=True)

    def stamp(at: datetime) -> str:
        return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    ticker = COINS[coin_id].split("-")[0]
    return _json(
        {
            "id": coin_id,
            "symbol": ticker.lower(),
            "name": coin_id.capitalize(),
            "market_data": {
                "current_price": {"usd": last["price"]},
                "ath": {"usd": high["price"]},
                "ath_change_percentage": {"usd": (last["price"] / high["price"] - 1) * 100},
                "ath_date": {"usd": stamp(high["timestamp"])},
                "atl": {"usd": low["price"]},
                "atl_date": {"usd": stamp(low["timestamp"])},
                "market_cap": {"usd": last["market_cap"]},
                "total_volume": {"usd": last["total_volume"]},
                "last_updated": stamp(last["timestamp"]),
            },
            "last_updated": stamp(last["timestamp"]),
        }
    )
