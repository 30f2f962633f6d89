"""Settings from a file: what it names must be a setting; the environment holds other programs' names too."""

from __future__ import annotations

from pathlib import Path

import pytest

from crpbot_lib.config import Settings


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "crpbot.toml"
    monkeypatch.setenv("CRPBOT_CONFIG", str(path))
    return path


def test_a_file_is_read_below_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('lake = "s3://from-the-file"\n[training]\ndays = 3\n[promotion]\nallow_smoke = true\n')
    monkeypatch.setenv("CRPBOT_LAKE", "s3://from-the-environment")
    monkeypatch.setenv("CRPBOT_OF_ANOTHER_PROGRAM", "1")
    settings = Settings()
    assert (settings.lake, settings.training.days, settings.promotion.allow_smoke) == ("s3://from-the-environment", 3, True)


def test_a_name_that_is_no_setting_is_refused(file: Path) -> None:
    file.write_text('coinbase_ur = "http://x"\n[promotions]\nallow_smoke = true\n')
    with pytest.raises(
        ValueError, match=r"crpbot.toml'?: no setting is called coinbase_ur, promotions; there are lake, coinbase_url, "
    ):
        Settings()


def test_so_is_one_inside_a_section(file: Path) -> None:
    file.write_text("[training]\nday = 3\n")
    with pytest.raises(ValueError, match=r"training\.day"):
        Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("coinbase_page_size", 351),
        ("coinbase_page_size", 0),
        ("coingecko_plan", "analyst"),
        ("coingecko_requests_per_second", 0),
        ("coingecko_history_days", 0),
        ("http_timeout_seconds", 0),
    ],
)
def test_a_value_out_of_its_range_is_refused_and_the_key_not_shown(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as error:
        Settings(**{name: value, "coingecko_api_key": "CG-nobody-may-see"})  # type: ignore[arg-type]
    assert "nobody-may-see" not in str(error.value)


def test_the_key_is_not_shown_with_the_settings() -> None:
    assert "nobody-may-see" not in repr(Settings(coingecko_api_key="CG-nobody-may-see"))  # type: ignore[arg-type]
