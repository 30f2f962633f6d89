"""The catalog is the one source of counts, names, types, hash and documentation."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from crpbot_lib import candle_rules, market_data
from crpbot_lib.config import ALL_GROUPS, WITHOUT_MULTI_TIMEFRAME, Settings, Symbol
from crpbot_lib.features import FeatureError, catalog, coingecko, dictionary


def test_counts_are_those_of_the_mission() -> None:
    counts = {group: len(catalog.names([group])) for group in ALL_GROUPS}
    assert counts == {"base": 31, "multi_timeframe": 19, "coingecko_hourly": 12, "coingecko_daily": 11}
    assert [len(catalog.feature_names(s)) for s in ("BTC-USD", "ETH-USD", "SOL-USD")] == [73, 54, 73]


def test_names_are_unique_ordered_by_group_and_none_is_excluded() -> None:
    names = catalog.names(ALL_GROUPS)
    assert len(set(names)) == len(names)
    assert not set(names) & set(catalog.EXCLUDED)
    assert names == [n for g in ALL_GROUPS for n in catalog.names([g])]
    assert catalog.names(reversed(ALL_GROUPS)) == names, "the order is the catalog's, whatever the order of the groups"


def test_a_fourth_symbol_is_configuration_only() -> None:
    from datetime import date

    doge = Symbol(name="DOGE-USD", coin="dogecoin", coin_listed=date(2013, 12, 15), feature_groups=WITHOUT_MULTI_TIMEFRAME)
    assert len(catalog.feature_names("DOGE-USD", Settings(symbols=(doge,)))) == 54


def test_schema_is_what_a_file_must_have() -> None:
    schema = catalog.schema(ALL_GROUPS)
    assert list(schema)[:8] == list(catalog.EXCLUDED)
    assert {schema[n] for n in catalog.names(ALL_GROUPS)} == {pl.Float32()}


def test_hash_depends_on_the_groups_and_not_on_their_order() -> None:
    assert catalog.catalog_hash(ALL_GROUPS) != catalog.catalog_hash(WITHOUT_MULTI_TIMEFRAME)
    assert catalog.catalog_hash(ALL_GROUPS) == catalog.catalog_hash(tuple(reversed(ALL_GROUPS)))


def test_hash_changes_with_the_source_of_a_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = catalog._hash.__wrapped__(ALL_GROUPS)
    folder = tmp_path / "features"
    folder.mkdir()
    for source in Path(catalog.__file__).parent.glob("*.py"):
        text = source.read_text()
        (folder / source.name).write_text(text.replace("4 * BB_STD / CLOSE", "3.9 * BB_STD / CLOSE"))
    monkeypatch.setattr(catalog, "__file__", str(folder / "catalog.py"))
    assert catalog._hash.__wrapped__(ALL_GROUPS) != before


def test_hash_changes_with_the_publication_lag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides which point a row sees; the clients of the API take it from here."""
    before = catalog._hash.__wrapped__(ALL_GROUPS)
    for source in Path(catalog.__file__).parent.glob("*.py"):
        (tmp_path / source.name).write_text(
            source.read_text().replace('"hourly": timedelta(minutes=5)', '"hourly": timedelta(minutes=6)')
        )
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "catalog.py"))
    assert catalog._hash.__wrapped__(ALL_GROUPS) != before
    assert market_data.coingecko.LAG is coingecko.PUBLICATION_LAG


def test_hash_changes_with_the_length_of_a_hole_that_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands with the rules of candles, outside of the sources that are hashed, because the gap record goes by it too."""
    before = catalog._hash.__wrapped__(ALL_GROUPS)
    monkeypatch.setattr(candle_rules, "MAX_NO_TRADE_MINUTES", candle_rules.MAX_NO_TRADE_MINUTES + 1)
    assert catalog._hash.__wrapped__(ALL_GROUPS) != before


def test_a_comment_or_a_docstring_does_not_change_the_hash() -> None:
    plain = catalog.normalized_source("def f(x):\n    return x + 1\n")
    assert catalog.normalized_source('def f(x):  # why\n    """What."""\n\n    return (x + 1)\n') == plain
    assert catalog.normalized_source("def f(x):\n    return x + 2\n") != plain


def test_an_unknown_name_gives_the_near_ones() -> None:
    with pytest.raises(FeatureError, match="no feature is called 'bb_positon'; did you mean bb_position"):
        catalog.find("bb_positon")


def test_warm_ups_fit_into_what_is_read_before_an_interval() -> None:
    assert catalog.SEGMENT_WARM_UP < catalog.CANDLE_LEAD_DAYS * 1440
    hourly = max(f.warm_up for f in catalog.features(["coingecko_hourly"]))
    assert hourly < catalog.HOURLY_LEAD_DAYS * 24


def test_the_data_dictionary_is_fresh() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "features.md"
    assert page.read_text(encoding="utf-8") == dictionary.markdown(), "run: crpbot features dictionary > docs/features.md"
