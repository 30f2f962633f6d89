"""Fundamentals from CoinGecko's Pro API: price, market cap and trailing 24 h volume, hourly and daily, in USD.

The API: ``GET /coins/{id}/market_chart/range?vs_currency&from&to&interval`` answers three arrays of ``[UNIX milliseconds, value or
null]``. Stamps may lie seconds or minutes off their hour or day, and the last point may be "now", which is no point of the series.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import polars as pl
from pydantic import SecretStr

from crpbot_lib.features.coingecko import PUBLICATION_LAG
from crpbot_lib.market_data.frames import EPOCH, POINT_SCHEMA, SERIES_WIDTH, TIMESTAMP, Clock, Series, floor, in_utc, utc_now
from crpbot_lib.market_data.http import HttpClient, MarketDataError, shared_limiter
from crpbot_lib.market_data.progress import Progress
from crpbot_lib.market_data.quality import check_points

log = logging.getLogger(__name__)

REQUESTS_PER_SECOND = 8.0
"""The smallest paid plan allows 500 requests a minute."""
LAG = PUBLICATION_LAG
LONGEST_RANGE: dict[str, timedelta | None] = {"hourly": timedelta(days=85), "daily": None}
"""The API gives hourly points for ranges up to about 90 days, daily points for any."""
BEYOND: dict[str, timedelta] = {"hourly": timedelta(hours=3), "daily": timedelta(days=2)}
"""How far past its end a range is asked for: then the last point of the range is not the last of the answer, and the answer's
last point, which may be "now", is not in the range unless the range reaches into the present."""
NOW_POINT_AGE = timedelta(minutes=5)
"""An off-grid point at the end of an answer is "now" when it is no older: the API keeps answers for up to 5 minutes. A point of the
hourly series that is as young is not available yet either (its lag is as long), so nothing is lost with it."""
COLUMNS = {"prices": "price", "market_caps": "market_cap", "total_volumes": "total_volume"}


class CoinGeckoClient:
    """The Pro plan of one CoinGecko host; the key travels in the header ``x-cg-pro-api-key`` only. By ``now`` the "now" point is
    told from the last point of a past range."""

    def __init__(
        self,
        url: str,
        api_key: SecretStr | str | None,
        *,
        now: Clock = utc_now,
        requests_per_second: float = REQUESTS_PER_SECOND,
        http: HttpClient | None = None,
    ) -> None:
        self._now = now
        key = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key or ""
        self._http = http or HttpClient(
            "CoinGecko",
            url,
            limiter=shared_limiter(url, requests_per_second),
            headers={"x-cg-pro-api-key": key} if key else {},
            secrets=[key],
            hint=_hint,
        )

    def hourly(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        """The hourly points of ``coin`` stamped in ``[start, end)`` (timezone-aware), one an hour, sorted (POINT_SCHEMA).

        ``timestamp`` is the stamp floored to the hour, ``available_at`` the unfloored stamp + 5 minutes. Of two points in one hour
        the first is kept, the one known earliest. Hours that were not served are absent; nulls stay null. ``start`` is floored
        to the hour, so that this choice does not depend on where a range begins.
        """
        return self._range(coin, "hourly", start, end)

    def daily(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        """As ``hourly``, by UTC day: the snapshot at (about) 00:00 of each day, known 35 minutes after its own stamp."""
        return self._range(coin, "daily", start, end)

    def all_time_high(self, coin: str) -> tuple[float, datetime]:
        """(price in USD, when) of the highest price by CoinGecko's own record, as of this request: not for rows of the past."""
        body = self._http.get(
            f"/coins/{quote(coin, safe='')}",
            {
                "localization": "false",
                "tickers": "false",
                "market_data": "true",
                "community_data": "false",
                "developer_data": "false",
            },
        )
        try:
            market = body["market_data"]
            return float(market["ath"]["usd"]), datetime.fromisoformat(market["ath_date"]["usd"]).astimezone(UTC)
        except (KeyError, TypeError, ValueError) as error:
            raise MarketDataError(f"CoinGecko: /coins/{coin} has no market_data.ath.usd with its ath_date ({error!r})") from error

    def _range(self, coin: str, series: Series, start: datetime, end: datetime) -> pl.DataFrame:
        begin, stop = floor(in_utc(start, "start"), SERIES_WIDTH[series]), in_utc(end, "end")
        longest = LONGEST_RANGE[series] or max(stop - begin, timedelta(1))
        total = max(0, -((begin - stop) // longest))
        progress = Progress(log, f"{coin} {series}", total, "requests")
        frames = [pl.DataFrame(schema=POINT_SCHEMA)]
        for i in range(total):
            since = begin + i * longest
            frames.append(self._request(coin, series, since, min(since + longest, stop)))
            progress.done(i + 1)
        frame = pl.concat(frames, rechunk=True)
        check_points(frame, series, f"{coin} {series} as served")
        return frame

    def _request(self, coin: str, series: Series, start: datetime, end: datetime) -> pl.DataFrame:
        what = f"CoinGecko: {coin} {series} from {start:%Y-%m-%d %H:%M}"
        body = self._http.get(
            f"/coins/{quote(coin, safe='')}/market_chart/range",
            {
                "vs_currency": "usd",
                "from": (start - EPOCH) // timedelta(seconds=1),
                "to": (end + BEYOND[series] - EPOCH) // timedelta(seconds=1),
                "interval": series,
            },
        )
        step, now_since = SERIES_WIDTH[series], self._now() - NOW_POINT_AGE
        columns = [
            pl.DataFrame(
                list(_points(body.get(name), what, name, now_since, step).items()),
                schema={"stamp": pl.Int64, column: pl.Float64},
                orient="row",
            )
            for name, column in COLUMNS.items()
        ]
        joined = columns[0]
        for other in columns[1:]:
            joined = joined.join(other, on="stamp", how="full", coalesce=True)
        stamp = (pl.col("stamp") * 1000).cast(TIMESTAMP)
        return (
            joined.sort("stamp")
            .select(
                stamp.dt.truncate(step).alias("timestamp"),
                (stamp + LAG[series]).alias("available_at"),
                *COLUMNS.values(),
            )
            .filter((pl.col("available_at") - LAG[series]).is_between(start, end, closed="left"))
            .unique("timestamp", keep="first", maintain_order=True)
            .cast(dict(POINT_SCHEMA))  # type: ignore[arg-type]  # a dict of names to types is what cast takes
        )


def _points(items: Any, what: str, name: str, now_since: datetime, step: timedelta) -> dict[int, float | None]:
    """One of the three arrays as stamp (ms) -> value, without its "now" point and without stamps that go backwards."""
    if not isinstance(items, list):
        raise MarketDataError(f"{what}: no list {name!r} in the answer")
    points: list[tuple[int, float | None]] = []
    for item in items:
        try:
            stamp, value = item
            points.append((int(stamp), None if value is None else float(value)))
        except (TypeError, ValueError) as error:
            raise MarketDataError(
                f"{what}: {name!r} holds {str(item)[:100]}, expected [UNIX milliseconds, number or null]"
            ) from error
    kept: dict[int, float | None] = {}
    highest = -1
    for stamp, value in points:
        if stamp > highest:
            kept[stamp] = value
            highest = stamp
    backwards = sum(b[0] < a[0] for a, b in pairwise(points))
    if backwards > 1:
        log.warning("%s: %d stamps of %r go backwards and were dropped", what, backwards, name)
    # a range that ends in the past has no "now" point: its last point is one of the series, and stays
    if (
        points
        and points[-1][0] == highest
        and EPOCH + timedelta(milliseconds=highest) >= now_since
        and highest % (step // timedelta(milliseconds=1))
    ):
        del kept[highest]
    return kept


def _hint(status: int, code: int | None) -> str:
    other_host = "the key belongs to the other host: a Pro key goes with CRPBOT_COINGECKO_URL=https://pro-api.coingecko.com/api/v3"
    by_code = {
        10002: "set CRPBOT_COINGECKO_API_KEY to a Pro key",
        10005: "this needs a paid plan: check the plan of CRPBOT_COINGECKO_API_KEY",
        10010: other_host,
        10011: other_host,
        10012: "the plan of CRPBOT_COINGECKO_API_KEY does not reach that far back: the history since the listing needs a paid one",
    }
    by_status = {
        400: "the request itself is wrong: check coin and interval",
        401: "check CRPBOT_COINGECKO_API_KEY and its plan",
        403: "access is blocked, perhaps for this address",
        404: "check the coin's id in `symbols` and CRPBOT_COINGECKO_URL",
        422: "the request itself is wrong: check coin and interval",
        429: "too many requests: lower CRPBOT_COINGECKO_REQUESTS_PER_SECOND when this goes on",
    }
    if code in by_code:
        return by_code[code]
    return by_status.get(status, "check CRPBOT_COINGECKO_URL" if 300 <= status < 400 else "")
