"""CoinGecko's stand-in: market_chart/range and the coin endpoint in its wire format, as one of the plans pro, demo and public.

Without ``interval`` the range decides, as docs.coingecko.com says of this endpoint: 5-minutely points for a range within the last
day, hourly ones up to 90 days, daily ones above. The 5-minutely points are derived, on the line between two hourly ones. The
all-time high is that of the daily prices, which is what the data knows.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import polars as pl
from werkzeug.wrappers import Request, Response

from crpbot_lib.sandbox.data import COINS, Source

Plan = Literal["pro", "demo", "public"]
PRO_HEADER, DEMO_HEADER = "x-cg-pro-api-key", "x-cg-demo-api-key"
PRO_KEY, DEMO_KEY = "local-cloud-dummy-key", "local-cloud-dummy-demo-key"
KEYS: dict[Plan, str | None] = {"pro": PRO_KEY, "demo": DEMO_KEY, "public": None}
NO_POINTS: dict[str, Any] = {"prices": [], "market_caps": [], "total_volumes": []}
ERROR_BODY = {"status": 500, "error": "Internal Server Error"}
"""As recorded with status 500; with status 200 it is a fault."""
_DAY, _HOUR = 86_400_000, 3_600_000
"""Milliseconds."""
HISTORY_DAYS = 365
"""How far the demo and the keyless plan reach back."""
_VALUES = {"prices": "price", "market_caps": "market_cap", "total_volumes": "total_volume"}


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


class CoinGecko:
    """The stand-in over one source. ``now`` (timezone-aware) is the present, and nothing later is served; None: the clock, and
    nothing is held back. ``messy`` answers are as the real ones can be (``_disarrange``)."""

    def __init__(self, source: Source, plan: Plan = "pro", *, now: datetime | None = None, messy: bool = False) -> None:
        self.source, self.plan = source, plan
        self._now, self._messy = now, messy

    def market_chart_range(self, coin: str, request: Request) -> Response:
        """GET /coins/{coin}/market_chart/range?vs_currency=usd&from=&to=&interval= : UNIX seconds, both inclusive; nulls stay."""
        for name in ("vs_currency", "from", "to"):
            if not request.args.get(name):
                return _json({"error": f"Missing parameter {name}"}, 422)
        if request.args["vs_currency"] != "usd":
            return _json({"error": "invalid vs_currency"}, 422)
        try:
            begin, end = (round(float(request.args[name]) * 1000) for name in ("from", "to"))
        except (ValueError, OverflowError):
            return _json({"error": "invalid date range: UNIX seconds expected"}, 422)
        now = int((self._now or datetime.now(UTC)).timestamp() * 1000)
        if self.plan != "pro" and begin < now - HISTORY_DAYS * _DAY:
            return _beyond_the_plan()
        interval = request.args.get("interval") or None
        if interval == "5m":
            message = "This request is limited to Enterprise subscribers."
            return _json({"status": {"error_code": 10005, "error_message": message}}, 401)
        if interval not in (None, "hourly", "daily"):
            return _json({"error": f"invalid interval {interval}: hourly, daily, or none"}, 422)
        if interval == "hourly" and end - begin > 100 * _DAY:
            return _json({"error": "interval hourly is for 100 days a request at most"}, 422)
        daily = interval == "daily" or (interval is None and end - begin > 90 * _DAY)
        fives = interval is None and now - _DAY <= begin and end - begin <= _DAY
        frame = self.source.points(coin, "daily" if daily else "hourly")
        if frame is None:
            return _json({"error": "coin not found"}, 404)
        last = end if self._now is None else min(end, now)
        # the neighbours too: of a 5-minutely point, and of one that is moved into the range
        stamp = pl.col("timestamp")
        rows = frame.with_columns(stamp.dt.epoch("ms")).filter(stamp.is_between(begin - _HOUR, last + _HOUR))
        if fives:
            rows = _between_hours(rows)
        if self._messy:
            rows = _move(rows, daily=daily)
        rows = rows.filter(stamp.is_between(begin, last))
        if self._messy:
            rows = _disarrange(rows, now if begin <= now <= end else None)
        said = [str(self.source.kind_of(coin)), *(["derived"] if not daily else []), *(["messy"] if self._messy else [])]
        return _json(
            {name: rows.select("timestamp", column).rows() for name, column in _VALUES.items()},
            headers={"Cache-Control": "public, max-age=30", "X-Sandbox-Data": "; ".join(said)},
        )

    def coin(self, coin: str) -> Response:
        """GET /coins/{coin}: the fields around ``market_data.ath``."""
        frame = self.source.points(coin, "daily")
        if frame is None:
            return _json({"error": "coin not found"}, 404)
        if self._now is not None:
            frame = frame.filter(pl.col("timestamp") <= self._now)
        response = _json(_coin(coin, frame))
        response.headers["X-Sandbox-Data"] = self.source.kind_of(coin)
        return response


def _beyond_the_plan() -> Response:
    message = (
        "Your request exceeds the allowed time range. Public API users are limited to querying historical data within the past "
        f"{HISTORY_DAYS} days. Upgrade to a paid plan to enjoy full historical data access: "
        "https://www.coingecko.com/en/api/pricing. "
    )
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return _json({"error": {"status": {"timestamp": at, "error_code": 10012, "error_message": message}}}, 401)


def _between_hours(hours: pl.DataFrame) -> pl.DataFrame:
    """Every 5 minutes a point on the line from one hourly point to the next, where the next is an hour later."""
    follows = pl.col("timestamp").shift(-1) - pl.col("timestamp") == _HOUR
    steps = [hours]
    for step in range(1, 12):
        values = [(pl.col(c) + (pl.col(c).shift(-1) - pl.col(c)) * step / 12).alias(c) for c in _VALUES.values()]
        steps.append(
            hours.with_columns(pl.col("timestamp") + step * _HOUR // 12, *values).filter(hours.select(follows).to_series())
        )
    return pl.concat(steps).sort("timestamp")


def _draw(stamps: pl.Series, what: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A number below 2^32 for each stamp that looks random, and is the same in every answer that holds the stamp."""
    with np.errstate(over="ignore"):
        mixed = (stamps.to_numpy().astype(np.uint64) // np.uint64(1000) + np.uint64(what)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed >> np.uint64(32)


def _move(rows: pl.DataFrame, *, daily: bool) -> pl.DataFrame:
    """Stamps up to four minutes late, of the daily points one in twenty; one in fifty market caps and volumes null."""
    stamps = rows["timestamp"]
    late = _draw(stamps, 1) % np.uint64(240_000)
    if daily:
        late = np.where(_draw(stamps, 2) % np.uint64(20) == 0, late, np.uint64(0))
    nulls = [
        pl.when(pl.Series(_draw(stamps, what) % np.uint64(50) == 0)).then(None).otherwise(pl.col(column)).alias(column)
        for what, column in ((3, "market_cap"), (4, "total_volume"))
    ]
    return rows.with_columns(pl.Series("timestamp", stamps.to_numpy() + late.astype(np.int64)), *nulls).sort("timestamp")


def _disarrange(rows: pl.DataFrame, now: int | None) -> pl.DataFrame:
    """A point once more in the middle, after its successor, with a stamp of its own and another price; at the end, where the range
    holds the present, the last point once more as "now", in whole seconds."""
    middle = rows.height // 2
    if middle:
        again = rows[middle - 1].with_columns(pl.col("timestamp") + 1, pl.col("price") * 1.01)
        rows = pl.concat([rows[: middle + 1], again, rows[middle + 1 :]])
    if now is not None and rows.height:
        rows = pl.concat([rows, rows[-1].with_columns(pl.lit(now // 1000 * 1000).alias("timestamp"))])
    return rows


def _coin(coin_id: str, frame: pl.DataFrame) -> dict[str, Any]:
    high = frame.row(int(frame["price"].arg_max() or 0), named=True)
    low = frame.row(int(frame["price"].arg_min() or 0), named=True)
    last = frame.row(-1, named=True)

    def stamp(at: datetime) -> str:
        return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    return {
        "id": coin_id,
        "symbol": COINS.get(coin_id, coin_id).split("-")[0].lower(),
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
