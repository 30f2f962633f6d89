"""Fundamentals from CoinGecko: price, market cap and trailing 24 h volume, hourly and daily, in USD, on any of its plans.

The API: ``GET /coins/{id}/market_chart/range?vs_currency&from&to`` answers three arrays of ``[UNIX milliseconds, value or null]``.
Stamps may lie seconds or minutes off their hour or day, and the last point may be "now", which is no point of the series. The
parameter ``interval`` is left out: which plans may use it has changed more than once. Without it the range decides, on every plan:
5-minutely within the last day, hourly up to 90 days, daily (00:00 UTC) above.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import polars as pl
from pydantic import SecretStr

from crpbot_lib.features.coingecko import PUBLICATION_LAG
from crpbot_lib.market_data.frames import EPOCH, POINT_SCHEMA, SERIES_WIDTH, TIMESTAMP, Clock, Series, ceil, floor, in_utc, utc_now
from crpbot_lib.market_data.http import READ_TIMEOUT, Hint, HttpClient, MarketDataError, checked_url, limiter_name
from crpbot_lib.market_data.limiter import RateLimiter
from crpbot_lib.market_data.plans import PLANS, Plan
from crpbot_lib.market_data.progress import Progress
from crpbot_lib.market_data.quality import check_points

log = logging.getLogger(__name__)

DAY = timedelta(days=1)
LAG = PUBLICATION_LAG
LONGEST_RANGE: dict[str, timedelta | None] = {"hourly": timedelta(days=85), "daily": None}
"""Of one request. Hourly points come for ranges up to 90 days, daily points for any above."""
SHORTEST_RANGE: dict[str, timedelta] = {"hourly": timedelta(days=3), "daily": timedelta(days=92)}
"""Of one request: a shorter one would be answered in finer steps."""
BEYOND: dict[str, timedelta] = {"hourly": timedelta(hours=3), "daily": timedelta(days=2)}
"""How far past its end a range is asked for: then the last point of the range is not the last of the answer, and the answer's
last point, which may be "now", is not in the range unless the range reaches into the present."""
NOW_POINT_AGE = timedelta(minutes=5)
"""An off-grid point at the end of an answer is "now" when it is no older: the API keeps answers for up to 5 minutes. A point of the
hourly series that is as young is not available yet either (its lag is as long), so nothing is lost with it."""
COLUMNS = {"prices": "price", "market_caps": "market_cap", "total_volumes": "total_volume"}


class CoinGeckoClient:
    """One plan of CoinGecko at its host, or at ``url``; the key travels in the plan's header only.

    By ``now`` the "now" point is told from the last point of a past range, and a range that the plan does not reach is refused
    before it is asked for. ``requests_per_second`` None is the plan's rate, shared with all processes of the machine that use the
    same ``rate_limit_dir``; ``timeout`` and ``backoff`` are ``HttpClient``'s.
    """

    def __init__(
        self,
        url: str | None,
        api_key: SecretStr | str | None,
        *,
        plan: Plan = PLANS["pro"],
        now: Clock = utc_now,
        requests_per_second: float | None = None,
        rate_limit_dir: Path | None = None,
        timeout: float = READ_TIMEOUT,
        backoff: float = 1.0,
        http: HttpClient | None = None,
    ) -> None:
        self.plan, self._now = plan, now
        key = (api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key or "").strip()
        self._refusal = _wrong_key(plan, key)
        url = checked_url("CoinGecko", url or plan.url, "CRPBOT_COINGECKO_URL")
        self._http = http or HttpClient(
            "CoinGecko",
            url,
            limiter=RateLimiter(
                requests_per_second or plan.requests_per_second, name=limiter_name("CoinGecko", url), directory=rate_limit_dir
            ),
            headers={plan.header: key} if plan.header and not self._refusal else {},
            secrets=[key],
            hint=_hint(plan),
            timeout=timeout,
            backoff=backoff,
        )

    def hourly(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        """The hourly points of ``coin`` stamped in ``[start, end)`` (timezone-aware), one an hour, sorted (POINT_SCHEMA).

        ``timestamp`` is the stamp floored to the hour, ``available_at`` the unfloored stamp + 5 minutes. Of two points in one hour
        the first is kept, the one known earliest. Hours that were not served are absent; nulls stay null. ``start`` is floored
        to the hour, so that this choice does not depend on where a range begins. MarketDataError for a range that the plan does
        not reach, for no key where one is needed, and for whatever CoinGecko refuses.
        """
        return self._range(coin, "hourly", start, end)

    def daily(self, coin: str, start: datetime, end: datetime) -> pl.DataFrame:
        """As ``hourly``, by UTC day: the snapshot at (about) 00:00 of each day, known 35 minutes after its own stamp."""
        return self._range(coin, "daily", start, end)

    def all_time_high(self, coin: str) -> tuple[float, datetime]:
        """(price in USD, when) of the highest price by CoinGecko's own record, as of this request: not for rows of the past."""
        body = self._get(
            f"/coins/{quote(coin, safe='')}",
            {
                "localization": "false",
                "tickers": "false",
                "market_data": "true",
                "community_data": "false",
                "developer_data": "false",
            },
            {"market_data": dict},
        )
        try:
            market = body["market_data"]
            return float(market["ath"]["usd"]), datetime.fromisoformat(market["ath_date"]["usd"]).astimezone(UTC)
        except (KeyError, TypeError, ValueError) as error:
            why = self._http.clean(repr(error), 100)
        raise MarketDataError(f"CoinGecko: /coins/{coin} has no market_data.ath.usd with its ath_date ({why})")

    def _range(self, coin: str, series: Series, start: datetime, end: datetime) -> pl.DataFrame:
        begin, stop = floor(in_utc(start, "start"), SERIES_WIDTH[series]), in_utc(end, "end")
        earliest = self.earliest()
        if earliest and begin < min(earliest, stop):
            raise MarketDataError(
                f"CoinGecko: {coin} {series} from {begin:%Y-%m-%d}: the plan {self.plan.name!r} reaches back "
                f"{(self.plan.history or DAY).days} days, to {earliest:%Y-%m-%d}; ask from that day on "
                "(the highs before it are the symbol's `all_time_highs`, complete until `all_time_highs_until`), or use a plan "
                "with the whole history (CRPBOT_COINGECKO_PLAN, docs/market_data.md)",
                permanent=True,
            )
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
        since, until = self._asked(series, start, end)
        body = self._get(
            f"/coins/{quote(coin, safe='')}/market_chart/range",
            {
                "vs_currency": "usd",
                "from": (since - EPOCH) // timedelta(seconds=1),
                "to": (until - EPOCH) // timedelta(seconds=1),
            },
            dict.fromkeys(COLUMNS, list),
        )
        step, now_since = SERIES_WIDTH[series], self._now() - NOW_POINT_AGE
        columns = [
            pl.DataFrame(
                list(self._points(body[name], what, name, now_since, step).items()),
                schema={"stamp": pl.Int64, column: pl.Float64},
                orient="row",
            )
            for name, column in COLUMNS.items()
        ]
        joined = columns[0]
        for other in columns[1:]:
            joined = joined.join(other, on="stamp", how="full", coalesce=True)
        apart = [b - a for a, b in pairwise(joined["stamp"].sort())]
        if len(apart) > 1 and median(apart) > 12 * (step // timedelta(milliseconds=1)):
            raise MarketDataError(f"{what}: the answer has a point every {median(apart) / 3_600_000:.0f} hours, not {series} ones")
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

    def _points(self, items: list[Any], what: str, name: str, now_since: datetime, step: timedelta) -> dict[int, float | None]:
        """One of the three arrays as stamp (ms) -> value, without its "now" point and without stamps that go backwards."""
        points: list[tuple[int, float | None]] = []
        for item in items:
            if (point := _point(item)) is None:
                shown = self._http.clean(str(item), 100)
                raise MarketDataError(f"{what}: {name!r} holds {shown}, expected [UNIX milliseconds, number or null]")
            points.append(point)
        return _kept(points, what, name, now_since, step)

    def _asked(self, series: Series, start: datetime, end: datetime) -> tuple[datetime, datetime]:
        """The range around ``[start, end)`` that is answered in the series' own steps: wide enough, and within the plan."""
        shortest, until = SHORTEST_RANGE[series], end + BEYOND[series]
        since = min(start, min(until, self._now()) - shortest)
        earliest = self.earliest()
        if earliest and since < earliest:
            return earliest, max(until, earliest + shortest)
        return since, until

    def earliest(self) -> datetime | None:
        """The first day (its midnight, UTC) that the plan's history has whole now; None: all of them."""
        # some minutes less, for a clock that differs from theirs
        return None if self.plan.history is None else ceil(self._now() - self.plan.history + timedelta(minutes=10), DAY)

    def _get(self, path: str, params: dict[str, str | int], holds: dict[str, type]) -> dict[str, Any]:
        if self._refusal:
            raise MarketDataError(self._refusal, permanent=True)
        return self._http.get(path, params, holds=holds)


def _wrong_key(plan: Plan, key: str) -> str:
    """What is wrong with the key, "" if nothing; says nothing of the key itself."""
    if plan.header and not key:
        return (
            f"CoinGecko: the plan {plan.name!r} needs a key: set CRPBOT_COINGECKO_API_KEY, or CRPBOT_COINGECKO_PLAN=public for the "
            "plan without one"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        return "CoinGecko: CRPBOT_COINGECKO_API_KEY holds characters that no key has (spaces, line breaks, accents): copy it again"
    return ""


def _point(item: Any) -> tuple[int, float | None] | None:
    """(stamp in ms, value) of what should be such a pair; None for anything else."""
    try:
        stamp, value = item
        EPOCH + timedelta(milliseconds=int(stamp))
        return int(stamp), None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _kept(
    points: list[tuple[int, float | None]], what: str, name: str, now_since: datetime, step: timedelta
) -> dict[int, float | None]:
    kept: dict[int, float | None] = {}
    highest = -1
    for stamp, value in points:
        if stamp > highest:
            kept[stamp] = value
            highest = stamp
    # one is usual; a single stamp from the future would take all that follow it with it, and nobody would know
    if len(points) - len(kept) > 1:
        log.warning("%s: %d stamps of %r do not rise and were dropped", what, len(points) - len(kept), name)
    # a range that ends in the past has no "now" point: its last point is one of the series, and stays
    if (
        points
        and points[-1][0] == highest
        and EPOCH + timedelta(milliseconds=highest) >= now_since
        and highest % (step // timedelta(milliseconds=1))
    ):
        del kept[highest]
    return kept


def _hint(plan: Plan) -> Hint:
    other = f"the key belongs to the other host: set CRPBOT_COINGECKO_PLAN (now {plan.name!r}) to the key's plan"
    by_code = {
        10002: f"set CRPBOT_COINGECKO_API_KEY to a key of the plan {plan.name!r} (CRPBOT_COINGECKO_PLAN)",
        10005: f"this needs a paid plan, and CRPBOT_COINGECKO_PLAN is {plan.name!r}",
        10010: other,
        10011: other,
        10012: f"the plan behind {plan.name!r} does not reach that far back: set CRPBOT_COINGECKO_HISTORY_DAYS to what it does",
    }
    by_status = {
        200: "check CRPBOT_COINGECKO_URL when this goes on",
        400: "the request itself is wrong: check coin and interval",
        401: f"check CRPBOT_COINGECKO_API_KEY and its plan (CRPBOT_COINGECKO_PLAN is {plan.name!r})",
        403: "access is blocked, perhaps for this address",
        404: "check the coin's id in `symbols` and CRPBOT_COINGECKO_URL",
        422: "the request itself is wrong: check coin and interval",
        429: "too many requests: the month's credits may be used up; else lower CRPBOT_COINGECKO_REQUESTS_PER_SECOND",
    }

    def hint(status: int, code: int | None) -> str:
        if code in by_code:
            return by_code[code]
        return by_status.get(status, "check CRPBOT_COINGECKO_URL" if 300 <= status < 400 else "")

    return hint
