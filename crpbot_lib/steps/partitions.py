"""From a source into the lake: which partitions there are, which are to be fetched, and fetching them.

Every partition is written whole and holds what was served, nothing filled. A partition without rows says "fetched, and there was
nothing", which is not the same as a missing one. What is stored is not lost to an answer that has less.

However many days are asked for, what is held at once is ``ROWS_AT_ONCE`` rows being fetched and as many being written; whenever it
is killed, each partition is there whole or not at all.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import partial
from math import ceil
from operator import itemgetter
from typing import Any, Literal

import polars as pl

from crpbot_lib.config import Settings, Symbol
from crpbot_lib.features.history import first_daily_day
from crpbot_lib.lake import KeyMissingError, Lake, UnreadableError, keys
from crpbot_lib.market_data import Clock, MarketData, MarketDataError, QualityError
from crpbot_lib.market_data.coingecko import CoinGeckoClient
from crpbot_lib.market_data.frames import SERIES_WIDTH, width
from crpbot_lib.market_data.progress import Meter
from crpbot_lib.market_data.quality import Gap, check_candles, check_points
from crpbot_lib.market_data.quality import coverage as cover
from crpbot_lib.steps.days import DAY, closed_days, days_of, midnight

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 36_000
"""Rows fetched before they are written, in whole days: 25 days of 1m candles, and whole pages of 300 at every timeframe."""

IN_PARALLEL = 8
"""Partitions read or written at once; each waits for the lake, not for the processor."""

HOURLY_DAYS_A_REQUEST = 85
"""For estimates: hourly points come in ranges of less than 90 days."""

Summary = dict[str, Any]
Spans = list[tuple[datetime, datetime]]
"""Stretches of time ``[from, to)``, in order, none touching another."""
Refetch = Literal["absent", "incomplete", "all"]
REFETCH: tuple[Refetch, ...] = ("absent", "incomplete", "all")
Outcome = Literal["fetched", "filled", "unchanged", "changed", "kept"]


@dataclass(frozen=True)
class Series:
    """Partitions of one kind: candles of one symbol and timeframe, or points of one coin and series."""

    of: str
    """Product or coin, as its source calls it."""
    what: str
    symbol: str
    timeframe: str
    source: Literal["Coinbase", "CoinGecko"]
    step: timedelta
    first: date | None
    """The source has nothing before this day."""
    key: Callable[[date], str]
    begins: Callable[[date], date]
    """The first day of which a day's partition has rows; all end with their own day."""
    fetch: Callable[[datetime, datetime], pl.DataFrame]
    days_a_request: float
    client: CoinGeckoClient | None = None
    """Whose plan may not reach back to all days; None: there is no such limit."""

    @property
    def grows(self) -> bool:
        """Whether each partition holds those before it, so that one fetch makes them all."""
        return self.timeframe == "daily"

    def chunks(self, days: Sequence[date]) -> Iterator[list[date]]:
        """``days`` in pieces of at most ``ROWS_AT_ONCE`` rows, each of neighbouring days."""
        if self.grows:
            yield from [list(days)] if days else []
            return
        most = max(1, int(ROWS_AT_ONCE * self.step / DAY))
        chunk: list[date] = []
        for day in days:
            if chunk and (day != chunk[-1] + DAY or len(chunk) == most):
                yield chunk
                chunk = []
            chunk.append(day)
        if chunk:
            yield chunk

    def requests(self, days: Sequence[date]) -> int:
        """About how many requests ``days`` take."""
        return sum(max(1, ceil(len(chunk) / self.days_a_request)) for chunk in self.chunks(days))


@dataclass(frozen=True)
class Stored:
    """What became of one partition."""

    series: Series
    day: date
    rows: int
    expected: int
    gaps: int
    outcome: Outcome
    added: int = 0
    """Rows that were not stored before; ``changed``: stored ones with another value now; ``lost``: stored ones that the new
    answer lacks, or has as unknown."""
    changed: int = 0
    lost: int = 0

    @property
    def missing(self) -> int:
        return self.expected - self.rows

    def summary(self) -> Summary:
        counts = {"rows": self.rows, "expected": self.expected, "missing": self.missing, "gaps": self.gaps}
        return {"key": self.series.key(self.day), **counts}

    def healed(self) -> Summary:
        where = {"symbol": self.series.symbol, "timeframe": self.series.timeframe, "day": self.day.isoformat()}
        counts = {"rows": self.rows, "missing": self.missing, "added": self.added, "changed": self.changed, "lost": self.lost}
        return {**where, "outcome": self.outcome, **counts}


@dataclass
class Work:
    """The days to fetch of one series, and what was found of the others."""

    series: Series
    days: list[date]
    present: int = 0
    missing_present: int = 0

    @property
    def requests(self) -> int:
        return self.series.requests(self.days)


@dataclass
class Totals:
    """Sums over many partitions."""

    fetched: int = 0
    rows: int = 0
    missing: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    _history: tuple[int, int] = (0, 0)

    def add(self, stored: Stored) -> None:
        counted = (stored.rows, stored.missing)
        # of a history that grows only the longest counts: the others are parts of it
        before = self._history if stored.series.grows else (0, 0)
        self.fetched += 1
        self.rows += counted[0] - before[0]
        self.missing += counted[1] - before[1]
        self.outcomes[stored.outcome] += 1
        if stored.series.grows:
            self._history = counted


def candles(settings: Settings, market: MarketData, entry: Symbol, timeframe: str) -> Series:
    """The candles of one symbol; ValueError for an unknown timeframe."""
    step = width(timeframe)
    return Series(
        of=entry.name,
        what=f"{entry.name} {timeframe}",
        symbol=entry.name,
        timeframe=timeframe,
        source="Coinbase",
        step=step,
        first=entry.exchange_listed,
        key=partial(keys.candles, timeframe, entry.name),
        begins=lambda day: day,
        fetch=partial(market.candles, entry.name, timeframe),
        days_a_request=settings.coinbase_page_size * step / DAY,
    )


def points(settings: Settings, market: MarketData, entry: Symbol) -> list[Series]:
    """The coin's daily history and its hourly points."""
    plan = market.coingecko.plan
    if plan.history is not None and not entry.all_time_highs:
        log.warning(
            "CoinGecko's %s plan reaches back %d days, not to the listing of %s on %s: its features cannot be built without dated "
            "records in `all_time_highs` of %s (docs/market_data.md)",
            *(plan.name, plan.history.days, entry.coin, entry.coin_listed, entry.name),
        )
    common = {
        "of": entry.coin,
        "symbol": entry.name,
        "source": "CoinGecko",
        "first": entry.coin_listed,
        "client": market.coingecko,
    }
    return [
        Series(
            what=f"{entry.coin} daily history",
            timeframe="daily",
            step=SERIES_WIDTH["daily"],
            key=partial(keys.coingecko, "daily", entry.coin),
            begins=lambda day: first_daily_day(settings, entry, day),
            fetch=partial(market.daily, entry.coin),
            days_a_request=float("inf"),
            **common,  # type: ignore[arg-type]
        ),
        Series(
            what=f"{entry.coin} hourly",
            timeframe="hourly",
            step=SERIES_WIDTH["hourly"],
            key=partial(keys.coingecko, "hourly", entry.coin),
            begins=lambda day: day,
            fetch=partial(market.hourly, entry.coin),
            days_a_request=HOURLY_DAYS_A_REQUEST,
            **common,  # type: ignore[arg-type]
        ),
    ]


def all_series(settings: Settings, market: MarketData, entry: Symbol, timeframes: Sequence[str], coingecko: bool) -> list[Series]:
    """The coin's history and points, then the candles of ``timeframes``."""
    both = points(settings, market, entry) if coingecko else []
    return both + [candles(settings, market, entry, timeframe) for timeframe in timeframes]


def days_of_series(series: Series, start: date, end: date, now: Clock) -> list[date]:
    """The days of ``[start, end)``, once they are over; MarketDataError where the source has nothing so early."""
    days = closed_days(start, end, now)
    if series.first and start < series.first:
        setting = "exchange_listed" if series.source == "Coinbase" else "coin_listed"
        raise MarketDataError(
            f"{start} lies before the listing of {series.of} on {series.first}: begin there, or correct {setting} in `symbols`",
            permanent=True,
        )
    return days


def survey(
    lake: Lake,
    spans: Sequence[tuple[Series, list[date]]],
    refetch: Refetch,
    *,
    count: bool = False,
    no_trade: Mapping[str, Spans] | None = None,
) -> list[Work]:
    """Which of the days are to be fetched. ``count``: the rows that present partitions lack are counted. A day that lacks nothing
    outside of its symbol's ``no_trade`` is not incomplete. MarketDataError where a plan does not reach what is to be fetched."""
    if refetch not in REFETCH:
        raise ValueError(f"refetch={refetch!r}: expected one of {', '.join(REFETCH)}")
    work = []
    for series, days in spans:
        if refetch == "all":
            work.append(Work(series, days))
            continue
        stored = set(lake.keys(keys.partitions(series.key(days[0]))))
        there = [day for day in days if series.key(day) in stored]
        lacking = set(days) - set(there)
        missing = 0
        if count or refetch == "incomplete":
            silent = no_trade.get(series.symbol, []) if no_trade else []
            for day, lacks in zip(there, _lacks(lake, series, there, silent), strict=True):
                if refetch == "incomplete" and lacks:
                    lacking.add(day)
                else:
                    missing += lacks
        work.append(Work(series, sorted(lacking), len(days) - len(lacking), missing))
    check_reach(work)
    return work


def check_reach(work: Sequence[Work]) -> None:
    """MarketDataError where CoinGecko's plan does not, now, reach back to what is to be fetched; asks for nothing."""
    for one in work:
        series, client = one.series, one.series.client
        if client is None or not one.days or (earliest := client.earliest()) is None:
            continue
        day, reach, history = one.days[0], earliest.date(), client.plan.history or DAY
        if (begin := series.begins(day)) >= reach:
            continue
        later = next((d for d in days_of(day, reach + history) if series.begins(d) >= reach), None)
        remedy = f"begin on {later}" if later else _what_else(series, reach)
        raise MarketDataError(
            f"CoinGecko: the {series.what} for {day} begins on {begin}, and the plan {client.plan.name!r} reaches back "
            f"{history.days} days, to {reach}; {remedy}, load the candles only (`crpbot fetch all --candles-only`, `candles_only` "
            "of the DAG market_data_range), or use a plan that reaches further (CRPBOT_COINGECKO_PLAN, "
            "CRPBOT_COINGECKO_HISTORY_DAYS, docs/market_data.md)",
            permanent=True,
        )


def _what_else(series: Series, reach: date) -> str:
    """What helps where the history of no day can be had: it begins where the records of the all-time high end, or is too long."""
    return (
        f"set `all_time_highs_until` of {series.symbol} to {reach} or later, once its `all_time_highs` are complete until that day "
        "(or lower `training.days`, where the plan has fewer)"
    )


def _lacks(lake: Lake, series: Series, days: Sequence[date], silent: Spans) -> Iterator[int]:
    """How many rows each day's partition lacks: all of them where it cannot be read, none where each gap is ``silent``."""

    def lacks(day: date) -> int:
        begin, end = midnight(series.begins(day)), midnight(day + DAY)
        frame = stored_frame(lake, series.key(day))
        if frame is None:
            return (end - begin) // series.step
        found = cover(frame, series.step, begin, end)
        return 0 if all(_within(gap, silent) for gap in found.gaps) else found.missing

    with ThreadPoolExecutor(IN_PARALLEL) as pool:
        yield from pool.map(lacks, days)


def _within(gap: Gap, spans: Spans) -> bool:
    at = bisect(spans, gap.start, key=itemgetter(0)) - 1
    return at >= 0 and gap.start + timedelta(minutes=gap.minutes) <= spans[at][1]


@dataclass
class _Chunk:
    series: Series
    days: list[date]
    frame: pl.DataFrame
    seconds: float
    """That the fetch took."""
    writes: list[Future[Stored]] = field(default_factory=list)


def stream(lake: Lake, work: Sequence[Work], meter: Meter, *, replace: bool = False) -> Iterator[Stored]:
    """Fetches ``work``, and writes one piece of it while the next one is fetched. What is stored is not lost by it, unless it is
    to ``replace`` that."""
    # nothing is written before each source has answered once: a wrong key or an unknown product leaves nothing behind
    silent = {w.series.source for w in work if w.days}
    held: list[_Chunk] = []
    writing: list[_Chunk] = []
    with ThreadPoolExecutor(IN_PARALLEL) as pool:
        for one in work:
            series = one.series
            for days in series.chunks(one.days):
                began = time.monotonic()
                frame = series.fetch(midnight(series.begins(days[0])), midnight(days[-1] + DAY))
                if series.grows and frame.is_empty():
                    raise MarketDataError(
                        f"CoinGecko has no {series.what} from {series.begins(days[0])} to {days[-1]}: check the coin's id and "
                        "coin_listed in `symbols`, and the plan of CRPBOT_COINGECKO_API_KEY",
                        permanent=True,
                    )
                silent.discard(series.source)
                held.append(_Chunk(series, days, frame, time.monotonic() - began))
                meter.advance(0, series.requests(days), f"{series.what} {days[-1]}")
                if silent:
                    continue
                yield from _written(writing, meter)
                for chunk in held:
                    store = partial(_store, lake, chunk.series, chunk.frame, keep=not replace)
                    chunk.writes = [pool.submit(store, day) for day in chunk.days]
                held, writing = [], held
        yield from _written(writing, meter)


def _written(chunks: Sequence[_Chunk], meter: Meter) -> Iterator[Stored]:
    """What became of the chunks' partitions, once they are written."""
    for chunk in chunks:
        done: list[Stored] = []
        for write in chunk.writes:
            done.append(stored := write.result())
            if stored.outcome == "kept":
                log.warning(
                    "%s %s: kept as it is stored: the answer lacks %d of its rows",
                    *(chunk.series.what, stored.day, stored.lost),
                )
            meter.advance(1, 0, f"{chunk.series.what} {stored.day}")
        _report(chunk, done)
        yield from done


def _store(lake: Lake, series: Series, frame: pl.DataFrame, day: date, *, keep: bool) -> Stored:
    """Writes the day's part of ``frame``; ``keep``: unless that would lose rows, or is what is stored already."""
    begin, end = midnight(series.begins(day)), midnight(day + DAY)
    # rechunk: a day cut out of a longer fetch must give the same bytes as the day fetched alone
    part = frame.filter(pl.col("timestamp").is_between(begin, end, closed="left")).rechunk()
    old = stored_frame(lake, series.key(day)) if keep else None
    outcome: Outcome = "fetched"
    added = changed = lost = 0
    if old is not None and _sound(series, old, begin, end):
        added, changed, lost = _difference(old, part)
        outcome = "kept" if lost else "filled" if added else "changed" if changed else "unchanged"
    if outcome == "kept" and old is not None:
        part = old
    elif outcome != "unchanged":
        lake.write_frame(series.key(day), part)
    found = cover(part, series.step, begin, end)
    return Stored(series, day, found.rows, found.expected, len(found.gaps), outcome, added, changed, lost)


def stored_frame(lake: Lake, key: str) -> pl.DataFrame | None:
    """The partition; None where there is none, or none that can be read."""
    try:
        return lake.read_frame(key)
    except (KeyMissingError, UnreadableError):
        return None


def _sound(series: Series, frame: pl.DataFrame, begin: datetime, end: datetime) -> bool:
    """Whether a stored partition can be true: what cannot be is not worth keeping."""
    try:
        if series.source == "Coinbase":
            check_candles(frame, series.timeframe, begin, end, series.what)
        else:
            check_points(frame, series.timeframe, series.what)
    except QualityError:
        return False
    # a history that began earlier, under a longer plan, is worth more
    early = pl.lit(False) if series.grows else pl.col("timestamp") < begin
    return frame.filter(early | (pl.col("timestamp") >= end)).is_empty()


def _difference(old: pl.DataFrame, new: pl.DataFrame) -> tuple[int, int, int]:
    """Rows of ``new`` that ``old`` has not, rows with another value, rows of ``old`` that are absent or unknown in ``new``."""
    both = old.join(new, on="timestamp", suffix="_new")
    values = [c for c in old.columns if c != "timestamp"]
    unknown = pl.any_horizontal(pl.col(c).is_not_null() & pl.col(f"{c}_new").is_null() for c in values)
    other = pl.any_horizontal(pl.col(c).ne_missing(pl.col(f"{c}_new")) for c in values)
    lost = old.height - both.height + both.filter(unknown).height
    return new.height - both.height, both.filter(other).height, lost


def _report(chunk: _Chunk, written: Sequence[Stored]) -> None:
    # of a history that grows the last partition says it all
    counted = written[-1:] if chunk.series.grows else written
    rows, missing, gaps = sum(p.rows for p in counted), sum(p.missing for p in counted), sum(p.gaps for p in counted)
    empty = sum(p.rows == 0 for p in written)
    first, last = chunk.days[0], chunk.days[-1]
    days = f"{first}" if first == last else f"{first} to {last}"
    line = f"{chunk.series.what} {days}: {rows} rows, {missing} absent in {gaps} gaps, {chunk.seconds:.1f} s"
    if empty:
        log.warning("%s; %d of %d days were served without a row", line, empty, len(written))
    else:
        log.info("%s", line)
