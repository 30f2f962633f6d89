"""Planning, building and gating one version of the features.

A version is named by what it is made of: the catalog with its source, the interval, and the bytes of every input partition. So the
same plan built twice, or in any order, gives the same files, and a changed input gives another version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from typing import Any

import polars as pl

from crpbot_lib.config import ALL_GROUPS, Settings, Symbol
from crpbot_lib.features import candles, catalog, coingecko, multi_timeframe
from crpbot_lib.features.engineer import engineer, worst
from crpbot_lib.features.errors import FeatureError
from crpbot_lib.features.feature import Feature
from crpbot_lib.features.history import check_history
from crpbot_lib.lake import KeyMissingError, Lake, UnreadableError, keys

log = logging.getLogger(__name__)
Summary = dict[str, Any]
DAY = timedelta(days=1)

VARIES_AFTER = coingecko.DAILY_MAX_AGE
"""A column that does not change over rows spanning longer than this is a placeholder: no point of any series stands longer."""


class MissingInputError(FeatureError):
    """Input partitions are not in the lake; the message names them and the command that fetches them."""


class GateError(FeatureError):
    """A features file is not what the catalog says, or holds a column that cannot be real; the message is the whole difference.

    The known symptoms have classes of their own; of several, the first of the message is raised.
    """


class FeatureMismatchError(GateError):
    """The numeric features are not the catalog's: count, names, order, types or hash. At run time: predictions stuck at 50 %."""


class MultiTimeframeMissingError(FeatureMismatchError):
    """Features of the 5m, 15m and 1h candles are absent: their fetch was skipped."""


class PlaceholderError(GateError):
    """A column does not change over days, as only a placeholder does."""


class CoinGeckoPlaceholderError(PlaceholderError):
    """A CoinGecko feature is all zero or constant: the key is missing, on the wrong plan, or a snapshot stands for history."""


_KEY_OR_PLAN = "is the API key missing, or on the wrong plan?"
_SNAPSHOT = "is it one snapshot in place of the history?"
Problem = tuple[type[GateError], str]
"""A difference, and the error that it is on its own."""


@dataclass(frozen=True)
class _Input:
    """One partition that a symbol's features are computed from."""

    key: str
    series: str
    """A candle width, ``hourly`` or ``daily``."""
    day: date


def plan_features(settings: Settings, lake: Lake, symbols: Sequence[str], start: date, end: date) -> Summary:
    """What is to be built for the UTC days [start, end), and the version's name.

    Returns ``version, start, end, symbols, inputs`` (how many partitions) and ``digests`` (of each symbol's inputs). Computed once
    a run, before the symbols are built. FeatureError for an empty interval, MissingInputError when partitions are absent.
    """
    if not start < end:
        raise FeatureError(f"the interval [{start}, {end}) is empty: end is the day after the last one")
    if not symbols or len(set(symbols)) != len(symbols):
        raise FeatureError(f"symbols {list(symbols)}: expected at least one, each once")
    digests, count = {}, 0
    for name in symbols:
        inputs = _inputs(settings.symbol(name), start, end)
        digests[name] = _digest(_read(lake, settings.symbol(name), inputs))
        count += len(inputs)
    entries = [settings.symbol(name) for name in sorted(symbols)]
    identity = {
        "start": start.isoformat(),
        "end": end.isoformat(),
        "symbols": {
            s.name: {
                "catalog": catalog.catalog_hash(s.feature_groups),
                "inputs": digests[s.name],
                "all_time_highs": [[price, at.isoformat()] for price, at in s.all_time_highs],
            }
            for s in entries
        },
    }
    version = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    log.info("features %s: planned [%s, %s) for %s, %d input partitions", version, start, end, ", ".join(symbols), count)
    return {
        "version": version,
        "start": start.isoformat(),
        "end": end.isoformat(),
        "symbols": list(symbols),
        "inputs": count,
        "digests": digests,
    }


def build_features(settings: Settings, lake: Lake, plan: Summary, symbol: str) -> Summary:
    """Computes and writes one symbol's features file and its sidecar.

    Running it again with the same version writes the same bytes, whatever the number of threads. A version that has passed the gate
    is never replaced by other bytes.

    Returns ``symbol, key, rows, dropped, features, hash, sha256, filled, outages, seconds``. MissingInputError when a partition is
    absent, CoinGeckoPlaceholderError when CoinGecko's points are constant, FeatureError when the inputs are not those of the plan,
    cannot be used, give no row, or give other bytes than the gated version has.
    """
    began = time.monotonic()
    if symbol not in plan["symbols"]:
        raise FeatureError(f"{symbol} is not part of the plan {plan['version']}, which has {', '.join(plan['symbols'])}")
    entry = settings.symbol(symbol)
    start, end = date.fromisoformat(plan["start"]), date.fromisoformat(plan["end"])
    inputs = _inputs(entry, start, end)
    contents = _read(lake, entry, inputs)
    if _digest(contents) != plan["digests"][symbol]:
        raise FeatureError(f"{symbol}: the input partitions have changed since version {plan['version']} was planned; plan again")
    series = _series(entry, inputs, contents, start)
    del contents
    _refuse_placeholders(symbol, series, start)
    points: dict[str, Any] = {name: series.pop(name) for name in ("hourly", "daily") if name in series}
    points["all_time_high"] = list(entry.all_time_highs)
    built = engineer(symbol, entry.feature_groups, series, points, start=_midnight(start))
    rows = built.frame.height
    if not rows:
        raise FeatureError(f"{symbol}: no row of [{start}, {end}) could be computed: {built.lacking()}")
    content = _parquet(built.frame)

    key = keys.features(plan["version"], symbol)
    gated = _gated_sha256(lake, plan["version"], symbol)
    # neither hashing nor writing waits for the other, unless models may have learned from what is there
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(lambda: hashlib.sha256(content).hexdigest())
        if gated is not None and hashed.result() != gated:
            raise FeatureError(
                f"{symbol}: features {plan['version']} have passed the gate with sha256 {gated[:16]}…, this build gives "
                f"{hashed.result()[:16]}…; the file is left as it is. Use it (`crpbot features verify --version "
                f"{plan['version']}`), or build with the polars and numpy it was built with (its lock file)"
            )
        lake.write(key, content)
    sha256 = hashed.result()
    within = _from(built.holes, _midnight(start))
    filled, outages = within.filter(~pl.col("outage")), within.filter(pl.col("outage"))
    hash_ = catalog.catalog_hash(entry.feature_groups)
    lake.write_json(
        keys.features_sidecar(plan["version"], symbol),
        {
            "version": plan["version"],
            "symbol": symbol,
            "start": plan["start"],
            "end": plan["end"],
            "rows": rows,
            "minutes": built.minutes,
            "dropped": {
                "cold": built.cold,
                "unknown": built.minutes - built.cold - rows,
                "unknown_by_feature": dict(built.unknown),
            },
            "filled": _ranges(filled),
            "outages": _ranges(outages),
            "bars": built.bars,
            "groups": list(entry.feature_groups),
            "names": catalog.names(entry.feature_groups),
            "hash": hash_,
            "sha256": sha256,
        },
    )
    summary: Summary = {
        "symbol": symbol,
        "key": key,
        "rows": rows,
        "dropped": built.minutes - rows,
        "features": len(catalog.names(entry.feature_groups)),
        "hash": hash_,
        "sha256": sha256,
        "filled": int(filled["minutes"].sum()),
        "outages": outages.height,
        "seconds": round(time.monotonic() - began, 2),
    }
    log.info(
        "%s: %d rows x %d features, %d rows dropped, %d minutes filled, %d outages, %.1f s",
        *(symbol, rows, summary["features"], summary["dropped"], summary["filled"], summary["outages"], summary["seconds"]),
    )
    return summary


def _gated_sha256(lake: Lake, version: str, symbol: str) -> str | None:
    """Of the file with which ``version`` has passed the gate; None when it has not."""
    try:
        return str(lake.read_json(keys.features_manifest(version))["symbols"][symbol]["sha256"])
    except KeyMissingError:
        return None


def gate_features(settings: Settings, lake: Lake, plan: Summary) -> Summary:
    """Compares the built files with the catalog, then writes the version's manifest and the pointer to the latest version.

    Returns the manifest. GateError, or the class of the known symptom, lists every difference, of all symbols: counts, names,
    order, types, hash, nulls, rows outside the interval, too few of them for it, and columns that cannot be real (constant over
    days).
    """
    version, start, end = plan["version"], date.fromisoformat(plan["start"]), date.fromisoformat(plan["end"])
    checked = [_check_file(settings, lake, version, symbol, start, end) for symbol in plan["symbols"]]
    _raise_problems(version, [problem for problems, _ in checked for problem in problems])
    manifest = {
        "version": version,
        "start": plan["start"],
        "end": plan["end"],
        "catalog": catalog.catalog_hash(ALL_GROUPS),
        "symbols": {entry["symbol"]: entry for _, entry in checked},
    }
    lake.write_json(keys.features_manifest(version), manifest)
    lake.write_json(keys.FEATURES_LATEST, {"version": version, "manifest": keys.features_manifest(version)})
    counts = " / ".join(str(entry["features"]) for _, entry in checked)
    log.info("features %s: gate passed for %s: %s features", version, ", ".join(plan["symbols"]), counts)
    return manifest


def verify_features(settings: Settings, lake: Lake, version: str | None = None) -> Summary:
    """Checks a gated version (None: the latest) again, against the catalog and against its own manifest.

    Returns the manifest; GateError lists every difference, MissingInputError when there is no such version.
    """
    try:
        version = version or str(lake.read_json(keys.FEATURES_LATEST)["version"])
        manifest: Summary = lake.read_json(keys.features_manifest(version))
    except KeyMissingError as error:
        raise MissingInputError(f"{error}: no such version has passed the gate; build it with `crpbot features build`") from None
    start, end = date.fromisoformat(manifest["start"]), date.fromisoformat(manifest["end"])
    problems: list[Problem] = []
    for symbol, stated in manifest["symbols"].items():
        found, entry = _check_file(settings, lake, version, symbol, start, end)
        problems += found
        if not found and entry != stated:
            fields = ", ".join(k for k in sorted({*entry, *stated}) if entry.get(k) != stated.get(k))
            problems.append((GateError, f"{symbol}: the file is not the one of the manifest: {fields} differ"))
    _raise_problems(version, problems)
    return manifest


def _raise_problems(version: str, problems: Sequence[Problem]) -> None:
    if problems:
        kind = next((kind for kind, _ in problems if kind is not GateError), GateError)
        raise kind(f"features {version} do not agree with the catalog:\n  " + "\n  ".join(text for _, text in problems))


def _check_file(settings: Settings, lake: Lake, version: str, symbol: str, start: date, end: date) -> tuple[list[Problem], Summary]:
    """The problems of one file, readable, and its entry of the manifest."""
    groups = settings.symbol(symbol).feature_groups
    key = keys.features(version, symbol)
    try:
        content = lake.read(key)
        sidecar: Summary = lake.read_json(keys.features_sidecar(version, symbol))
        frame = pl.read_parquet(BytesIO(content))
    except (KeyMissingError, UnreadableError) as error:
        return [(GateError, f"{symbol}: {error}; run the build of this symbol again")], {"symbol": symbol}
    except pl.exceptions.PolarsError as error:
        unreadable = f"{symbol}: {lake.url(key)} is not a readable parquet file ({error}); run its build again"
        return [(GateError, unreadable)], {"symbol": symbol}

    hash_, sha256 = catalog.catalog_hash(groups), hashlib.sha256(content).hexdigest()
    expected = catalog.schema(groups)
    problems = _schema_problems(frame, expected)
    sound = [f for f in catalog.features(groups) if frame.schema.get(f.name) == expected[f.name]]
    if frame.schema.get("timestamp") == expected["timestamp"]:
        problems += _value_problems(frame, sound, start, end)
        problems += _share_problems(frame.height, sidecar, start, end, settings.features.min_row_share)
    if sidecar["hash"] != hash_:
        other = f"built under catalog {sidecar['hash']}, today's is {hash_}; plan and build again"
        problems.append((FeatureMismatchError, other))
    if sidecar["sha256"] != sha256:
        stated = f"sha256 of the file is {sha256[:16]}…, its sidecar says {sidecar['sha256'][:16]}…; run its build again"
        problems.append((GateError, stated))
    entry = {
        "symbol": symbol,
        "rows": frame.height,
        "features": len([c for c in frame.columns if c not in catalog.EXCLUDED]),
        "names": [c for c in frame.columns if c not in catalog.EXCLUDED],
        "hash": hash_,
        "sha256": sha256,
        "key": key,
        "filled": sum(n for _, n in sidecar["filled"]),
        "outages": len(sidecar["outages"]),
        "dropped": sidecar["minutes"] - sidecar["rows"],
    }
    return [(kind, f"{symbol}: {text}") for kind, text in problems], entry


def _schema_problems(frame: pl.DataFrame, expected: dict[str, pl.DataType]) -> list[Problem]:
    found, wanted = frame.columns, list(expected)
    problems: list[Problem] = []
    if found != wanted:
        missing, extra = [c for c in wanted if c not in found], [c for c in found if c not in wanted]
        lost = [c for c in missing if c in catalog.names(["multi_timeframe"])]
        if lost:
            fetched = f"multi-TF features missing: {', '.join(lost)}; were the 5m, 15m and 1h candles fetched?"
            problems.append((MultiTimeframeMissingError, fetched))
        texts = []
        count, due = (len([c for c in columns if c not in catalog.EXCLUDED]) for columns in (found, wanted))
        if count != due:
            texts.append(f"{count} numeric features, the catalog has {due} (feature mismatch)")
        if others := [c for c in missing if c not in lost]:
            texts.append(f"missing: {', '.join(others)}")
        if extra:
            texts.append(f"not in the catalog: {', '.join(extra)}")
        if not missing and not extra:
            place = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
            texts.append(f"the order differs from column {place} on: {found[place]}, the catalog has {wanted[place]}")
        problems += [(FeatureMismatchError, text) for text in texts]
    types = [f"{c} is {frame.schema[c]}, expected {t}" for c, t in expected.items() if c in found and frame.schema[c] != t]
    return problems + [(FeatureMismatchError, text) for text in types]


def _value_problems(frame: pl.DataFrame, features: Sequence[Feature], start: date, end: date) -> list[Problem]:
    """What cannot be in the rows of a file, and in those of ``features`` that it has."""
    if frame.is_empty():
        return [(GateError, "no rows")]
    nulls = {c: n for c, n in frame.null_count().row(0, named=True).items() if n}
    texts = [f"nulls: {', '.join(f'{c} {n}' for c, n in nulls.items())}"] if nulls else []
    times = frame["timestamp"].drop_nulls()
    first, last = (times[0], times[-1]) if len(times) else (_midnight(start), _midnight(start))
    if not (times.diff().drop_nulls() > timedelta(0)).all():
        texts.append("timestamps are not ascending and unique")
    elif first < _midnight(start) or last >= _midnight(end):
        texts.append(f"rows from {first} to {last} are not within [{start}, {end})")
    if not_finite := [f.name for f in features if not frame[f.name].is_finite().all()]:
        texts.append(f"not finite: {', '.join(not_finite)}")
    problems: list[Problem] = [(GateError, text) for text in texts]
    if last - first <= VARIES_AFTER:
        return problems
    known = frame.select(pl.col(f.name).fill_nan(None) for f in features)
    least, most = known.min().row(0, named=True), known.max().row(0, named=True)
    constant = {f.name: least[f.name] for f in features if not f.may_be_constant and least[f.name] == most[f.name] is not None}
    ours = {f.name for f in features if f.group.startswith("coingecko")}
    if zero := [name for name, value in constant.items() if name in ours and value == 0]:
        problems.append((CoinGeckoPlaceholderError, f"CoinGecko features all zero: {', '.join(zero)}; {_KEY_OR_PLAN}"))
    if same := [f"{name} = {value:g}" for name, value in constant.items() if name in ours and value != 0]:
        text = f"CoinGecko features constant from {first} to {last}: {', '.join(same)}; {_SNAPSHOT}"
        problems.append((CoinGeckoPlaceholderError, text))
    if others := [f"{name} = {value:g}" for name, value in constant.items() if name not in ours]:
        problems.append((PlaceholderError, f"constant from {first} to {last}, as only a placeholder is: {', '.join(others)}"))
    return problems


def _refuse_placeholders(symbol: str, series: Mapping[str, pl.DataFrame], start: date) -> None:
    """Names the known symptom where it begins: of constant points most features are unknown, and no row would be left to judge."""
    for name in ("hourly", "daily"):
        if name not in series:
            continue
        points = series[name].filter(pl.col("timestamp") >= _midnight(start) - catalog.HOURLY_LEAD_DAYS * DAY)
        if points.is_empty() or points["timestamp"][-1] - points["timestamp"][0] <= VARIES_AFTER:
            continue
        for column in ("price", "market_cap", "total_volume"):
            values = points[column].drop_nulls()
            if values.n_unique() != 1:
                continue
            said = f"0; {_KEY_OR_PLAN}" if values[0] == 0 else f"{values[0]:g}; {_SNAPSHOT}"
            since = f"{points['timestamp'][0]:%Y-%m-%d %H:%M} UTC"
            raise CoinGeckoPlaceholderError(
                f"{symbol}: {column} of all {len(values)} {name} CoinGecko points since {since} is {said} Mend that and fetch them "
                "again with `crpbot fetch coingecko`"
            )


def _share_problems(rows: int, sidecar: Summary, start: date, end: date, least: float) -> list[Problem]:
    """A file whose interval is mostly without rows: most of it would be learned from too little, or from one regime."""
    minutes, dropped = (end - start) // timedelta(minutes=1), sidecar["dropped"]
    if rows >= least * minutes:
        return []
    text = (
        f"{rows} rows for the {minutes} minutes of [{start}, {end}), {100 * rows / minutes:.1f} %, expected at least "
        f"{100 * least:g} % (features.min_row_share): {sidecar['minutes']} minutes have a candle, {dropped['cold']} of them lie "
        f"too soon after the beginning or an outage; minutes that lack a feature: {worst(dropped['unknown_by_feature'])}; "
        "fetch the partitions that hold too little again and build anew"
    )
    return [(GateError, text)]


def _inputs(symbol: Symbol, start: date, end: date) -> list[_Input]:
    """The partitions that the features of [start, end) need, warm-up included."""
    groups = symbol.feature_groups
    widths = ("1m", *(multi_timeframe.WIDTHS if "multi_timeframe" in groups else ()))
    candle_days = _days(start - catalog.CANDLE_LEAD_DAYS * DAY, end)
    found = [_Input(keys.candles(w, symbol.name, day), w, day) for w in widths for day in candle_days]
    if "coingecko_hourly" in groups:
        hourly_days = _days(catalog.first_hourly_day(start, symbol.coin_listed), end)
        found += [_Input(keys.coingecko("hourly", symbol.coin, day), "hourly", day) for day in hourly_days]
    if "coingecko_daily" in groups:
        # one partition holds the history from the listing to its day
        found.append(_Input(keys.coingecko("daily", symbol.coin, end - DAY), "daily", end - DAY))
    return found


def _read(lake: Lake, symbol: Symbol, inputs: Sequence[_Input]) -> list[bytes]:
    """The bytes of ``inputs``, in their order; MissingInputError names all that are absent."""
    contents = lake.read_each([one.key for one in inputs])
    absent = [one for one, content in zip(inputs, contents, strict=True) if content is None]
    if absent:
        commands = "\n  ".join(_fetch_commands(symbol, absent))
        raise MissingInputError(
            f"{symbol.name}: {len(absent)} of {len(inputs)} input partitions are not in the lake, first {lake.url(absent[0].key)}; "
            f"fetch them with\n  {commands}"
        )
    return [content for content in contents if content is not None]


def _fetch_commands(symbol: Symbol, absent: Sequence[_Input]) -> list[str]:
    """One command for each series, over the days from its first to its last missing partition."""
    commands = []
    for series in dict.fromkeys("coingecko" if i.series in ("hourly", "daily") else i.series for i in absent):
        days = [i.day for i in absent if i.series == series or (series == "coingecko" and i.series in ("hourly", "daily"))]
        interval = f"--start {min(days)} --end {max(days) + DAY}"
        if series == "coingecko":
            commands.append(f"crpbot fetch coingecko --coin {symbol.coin} {interval}")
        else:
            commands.append(f"crpbot fetch candles --symbol {symbol.name} --timeframe {series} {interval}")
    return commands


def _digest(contents: Iterable[bytes]) -> str:
    """One hash of all the inputs, whatever their order."""
    each = sorted(hashlib.sha256(content).hexdigest() for content in contents)
    return hashlib.sha256("".join(each).encode()).hexdigest()


def _series(symbol: Symbol, inputs: Sequence[_Input], contents: Sequence[bytes], start: date) -> dict[str, pl.DataFrame]:
    """Each series that the features are computed from, by its candle width, ``hourly`` or ``daily``."""
    parts: dict[str, list[tuple[str, bytes]]] = {}
    for one, content in zip(inputs, contents, strict=True):
        parts.setdefault(one.series, []).append((one.key, content))
    with ThreadPoolExecutor(len(parts)) as pool:
        series = dict(zip(parts, pool.map(_decoded, parts.values()), strict=True))
    if "daily" in series:
        check_history(symbol, series["daily"], _midnight(start))
    return series


def _decoded(parts: Sequence[tuple[str, bytes]]) -> pl.DataFrame:
    """The partitions of one series, one under the other."""
    try:
        # a chunk a partition would be rechunked by every column that is computed from it
        return pl.read_parquet([content for _, content in parts]).rechunk()
    except pl.exceptions.PolarsError as error:
        for key, content in parts:
            try:
                schema = dict(pl.read_parquet(BytesIO(content)).schema)
            except pl.exceptions.PolarsError as broken:
                raise UnreadableError(f"{key} is not a readable parquet file ({broken}); delete it and fetch it again") from broken
            if schema not in (candles.CANDLE_SCHEMA, candles.POINT_SCHEMA):
                has = ", ".join(f"{name} {dtype}" for name, dtype in schema.items())
                raise UnreadableError(f"{key} has other columns than a partition: {has}; delete it and fetch it again") from error
        raise


def _parquet(frame: pl.DataFrame) -> bytes:
    """The features file of ``frame``: the same bytes for the same rows and chunks, whatever the number of threads."""
    buffer = BytesIO()
    frame.write_parquet(buffer, compression="zstd", compression_level=1, statistics=False)
    return buffer.getvalue()


def _from(holes: pl.DataFrame, begin: datetime) -> pl.DataFrame:
    """The part of ``holes`` at or after ``begin``; a hole that spans it begins there."""
    end = pl.col("start") + pl.duration(minutes=pl.col("minutes"))
    left = (end - pl.max_horizontal("start", pl.lit(begin))).dt.total_minutes()
    return holes.filter(end > begin).with_columns(
        pl.max_horizontal("start", pl.lit(begin)).alias("start"), left.cast(holes.schema["minutes"]).alias("minutes")
    )


def _ranges(holes: pl.DataFrame) -> list[list[Any]]:
    return [[start.strftime("%Y-%m-%dT%H:%MZ"), minutes] for start, minutes, _ in holes.iter_rows()]


def _days(start: date, end: date) -> list[date]:
    return [start + i * DAY for i in range((end - start).days)]


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
