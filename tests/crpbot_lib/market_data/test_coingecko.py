"""CoinGecko's points: floored for joining, unfloored for knowing when; nothing invented, "now" never taken for a point."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from crpbot_lib.market_data import CoinGeckoClient, MarketDataError, QualityError
from crpbot_lib.market_data.frames import POINT_SCHEMA
from crpbot_lib.market_data.plans import PLANS

START = datetime(2025, 5, 5, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def point(moment: datetime, price: float | None = 1.0) -> tuple[int, float | None, float | None, float | None]:
    return ms(moment), price, None if price is None else price * 1000, None if price is None else price * 10


@pytest.fixture
def client(wire: Any) -> CoinGeckoClient:
    return make(wire)


def make(wire: Any, plan: str = "pro", key: str | None = "key", **options: Any) -> CoinGeckoClient:
    return CoinGeckoClient(wire.url + "/api/v3", key, plan=PLANS[plan], requests_per_second=1e6, backoff=0.001, **options)


def asked(wire: Any) -> list[tuple[datetime, datetime]]:
    """(from, to) of the requests."""
    return [
        (datetime.fromtimestamp(int(r.query["from"]), UTC), datetime.fromtimestamp(int(r.query["to"]), UTC)) for r in wire.requests
    ]


def test_points_on_the_hour(wire: Any, client: CoinGeckoClient) -> None:
    wire.points["bitcoin", "hourly"] = [point(START + n * HOUR, 100 + n) for n in range(-2, 30)]
    got = client.hourly("bitcoin", START, START + DAY)
    assert got.schema == POINT_SCHEMA
    assert got["timestamp"].to_list() == [START + n * HOUR for n in range(24)]
    assert got.row(3) == (START + 3 * HOUR, START + 3 * HOUR + timedelta(minutes=5), 103.0, 103_000.0, 1030.0)


def test_a_request_asks_for_what_every_plan_takes(wire: Any, client: CoinGeckoClient) -> None:
    wire.points["bitcoin", "hourly"] = []
    client.hourly("bitcoin", START, START + DAY)
    [request] = wire.requests
    assert request.path == "/api/v3/coins/bitcoin/market_chart/range"
    assert set(request.query) == {"vs_currency", "from", "to"}
    assert request.query["vs_currency"] == "usd"


class TestTheRangeDecidesTheSteps:
    """Up to a day before the present: 5-minutely; 2 to 90 days: hourly; above: daily."""

    NOW = datetime(2025, 5, 20, 13, 7, tzinfo=UTC)

    @pytest.fixture(params=["pro", "demo", "public"])
    def at_now(self, wire: Any, request: pytest.FixtureRequest) -> CoinGeckoClient:
        wire.points = {("bitcoin", series): [] for series in ("hourly", "daily")}
        return make(wire, request.param, now=lambda: self.NOW)

    @pytest.mark.parametrize(
        ("back", "length"),
        [(364, 1), (364, 2), (300, 1), (200, 85), (100, 86), (3, 2), (1, 1), (0, 1), (364, 364)],
    )
    def test_hourly(self, wire: Any, at_now: CoinGeckoClient, back: int, length: int) -> None:
        start = self.NOW.replace(hour=0, minute=0) - back * DAY
        at_now.hourly("bitcoin", start, start + length * DAY)
        for since, until in asked(wire):
            assert 2 * DAY < min(until, self.NOW) - since <= 90 * DAY
            assert since >= self.NOW - (at_now.plan.history or 9999 * DAY)
        assert asked(wire)[0][0] <= start
        assert asked(wire)[-1][1] >= start + length * DAY

    @pytest.mark.parametrize(("back", "length"), [(364, 1), (364, 364), (300, 1), (100, 100), (3, 2), (0, 1)])
    def test_daily(self, wire: Any, at_now: CoinGeckoClient, back: int, length: int) -> None:
        start = self.NOW.replace(hour=0, minute=0) - back * DAY
        at_now.daily("bitcoin", start, start + length * DAY)
        [(since, until)] = asked(wire)
        assert min(until, self.NOW) - since > 90 * DAY
        assert self.NOW - (at_now.plan.history or 9999 * DAY) <= since <= start
        assert until >= start + length * DAY

    def test_five_minutely_points_give_the_first_of_each_hour(self, wire: Any, client: CoinGeckoClient) -> None:
        late = timedelta(minutes=2, seconds=11)
        wire.points["bitcoin", "hourly"] = [point(START + late + n * timedelta(minutes=5), 100 + n) for n in range(12 * 24)]
        got = client.hourly("bitcoin", START, START + DAY)
        assert got["timestamp"].to_list() == [START + n * HOUR for n in range(24)]
        assert got["price"].to_list() == [100.0 + 12 * n for n in range(24)]
        assert got["available_at"][5] == START + 5 * HOUR + late + timedelta(minutes=5)

    def test_finer_points_give_the_first_of_each_day(self, wire: Any, client: CoinGeckoClient) -> None:
        wire.points["bitcoin", "daily"] = [point(START + n * HOUR, 100 + n) for n in range(72)]
        assert client.daily("bitcoin", START, START + 3 * DAY)["price"].to_list() == [100.0, 124.0, 148.0]

    def test_daily_points_for_hours_are_an_error_and_no_gap(self, wire: Any, client: CoinGeckoClient) -> None:
        wire.points["bitcoin", "hourly"] = [point(START + n * DAY) for n in range(80)]
        with pytest.raises(
            MarketDataError, match="bitcoin hourly from 2025-05-05 00:00: the answer has a point every 24 hours, not hourly"
        ):
            client.hourly("bitcoin", START, START + 80 * DAY)


class TestPlans:
    NOW = datetime(2026, 5, 20, 13, 7, tzinfo=UTC)

    @pytest.mark.parametrize(
        ("plan", "url", "header"),
        [
            ("pro", "https://pro-api.coingecko.com/api/v3", "x-cg-pro-api-key"),
            ("demo", "https://api.coingecko.com/api/v3", "x-cg-demo-api-key"),
            ("public", "https://api.coingecko.com/api/v3", None),
        ],
    )
    def test_each_has_its_host_and_header(self, wire: Any, plan: str, url: str, header: str | None) -> None:
        wire.points["bitcoin", "hourly"] = []
        make(wire, plan, now=lambda: START + DAY).hourly("bitcoin", START, START + DAY)
        sent = {name: value for name, value in wire.requests[0].headers.items() if name.startswith("x-cg")}
        assert sent == ({header: "key"} if header else {})
        assert PLANS[plan].url == url

    @pytest.mark.parametrize("plan", ["pro", "demo", "public"])
    def test_a_minute_counted_from_any_request_holds_no_more_than_is_allowed(self, plan: str) -> None:
        assert round(60 * PLANS[plan].requests_per_second) + 1 <= PLANS[plan].requests_per_minute

    @pytest.mark.parametrize("series", ["hourly", "daily"])
    @pytest.mark.parametrize("plan", ["demo", "public"])
    def test_what_a_plan_does_not_reach_is_refused_before_it_is_asked_for(self, wire: Any, plan: str, series: str) -> None:
        client = make(wire, plan, now=lambda: self.NOW)
        with pytest.raises(MarketDataError) as error:
            getattr(client, series)("bitcoin", START, START + 500 * DAY)
        assert f"bitcoin {series} from 2025-05-05: the plan '{plan}' reaches back 365 days, to 2025-05-21" in str(error.value)
        assert "CRPBOT_COINGECKO_PLAN" in str(error.value)
        assert error.value.permanent
        assert wire.requests == []

    def test_the_earliest_day_that_is_named_is_served(self, wire: Any) -> None:
        wire.points["bitcoin", "daily"] = [point(datetime(2025, 5, 21, tzinfo=UTC))]
        got = make(wire, "demo", now=lambda: self.NOW).daily("bitcoin", datetime(2025, 5, 21, tzinfo=UTC), self.NOW)
        assert got.height == 1

    def test_the_paid_ones_reach_to_the_beginning(self, wire: Any) -> None:
        wire.points["bitcoin", "daily"] = []
        make(wire, now=lambda: self.NOW).daily("bitcoin", datetime(2013, 4, 28, tzinfo=UTC), self.NOW)
        assert len(wire.requests) == 1

    @pytest.mark.parametrize("plan", ["pro", "demo"])
    @pytest.mark.parametrize("key", [None, "", " "])
    def test_no_key_is_refused_before_the_request(self, wire: Any, plan: str, key: str | None) -> None:
        client = make(wire, plan, key, now=lambda: START + DAY)
        for ask in (lambda: client.daily("bitcoin", START, START + DAY), lambda: client.all_time_high("bitcoin")):
            with pytest.raises(MarketDataError, match=f"the plan '{plan}' needs a key: set CRPBOT_COINGECKO_API_KEY, or") as error:
                ask()
            assert error.value.permanent
        assert wire.requests == []

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            (10002, "set CRPBOT_COINGECKO_API_KEY to a key of the plan 'demo'"),
            (10005, "this needs a paid plan, and CRPBOT_COINGECKO_PLAN is 'demo'"),
            (10010, r"the other host: set CRPBOT_COINGECKO_PLAN \(now 'demo'\)"),
            (10011, r"the other host: set CRPBOT_COINGECKO_PLAN \(now 'demo'\)"),
            (10012, "does not reach that far back: set CRPBOT_COINGECKO_HISTORY_DAYS"),
        ],
    )
    def test_a_refusal_says_what_to_set(self, wire: Any, code: int, said: str) -> None:
        wire.says(401, {"status": {"error_code": code, "error_message": "no"}})
        with pytest.raises(MarketDataError, match=f"code {code}: no; .*{said}"):
            make(wire, "demo").all_time_high("bitcoin")
        assert len(wire.requests) == 1


class TestStampsOffTheGrid:
    def test_are_floored_but_known_by_their_own_time(self, wire: Any, client: CoinGeckoClient) -> None:
        late = START + HOUR + timedelta(minutes=34, seconds=51, milliseconds=663)
        wire.points["bitcoin", "hourly"] = [point(START + timedelta(seconds=13)), point(late), point(START + 2 * HOUR)]
        got = client.hourly("bitcoin", START, START + 2 * HOUR)
        assert got["timestamp"].to_list() == [START, START + HOUR]
        assert got["available_at"].to_list() == [START + timedelta(minutes=5, seconds=13), late + timedelta(minutes=5)]

    def test_days_likewise(self, wire: Any, client: CoinGeckoClient) -> None:
        off = START + timedelta(minutes=5, seconds=18)
        evening = START + DAY + timedelta(hours=23, minutes=29, seconds=55)
        wire.points["bitcoin", "daily"] = [point(off), point(evening), point(START + 2 * DAY)]
        got = client.daily("bitcoin", START, START + 2 * DAY)
        assert got["timestamp"].to_list() == [START, START + DAY]
        assert got["available_at"].to_list() == [off + timedelta(minutes=35), evening + timedelta(minutes=35)]

    def test_of_two_in_one_hour_the_first_is_kept(self, wire: Any, client: CoinGeckoClient) -> None:
        wire.points["bitcoin", "hourly"] = [point(START + timedelta(minutes=n), 100 + n) for n in (2, 50, 61)]
        got = client.hourly("bitcoin", START + timedelta(minutes=30), START + HOUR)
        assert got["price"].to_list() == [102.0]

    def test_the_last_point_of_a_past_range_is_kept(self, wire: Any, client: CoinGeckoClient) -> None:
        wire.points["bitcoin", "hourly"] = [point(START + n * HOUR + timedelta(seconds=7)) for n in range(30)]
        assert client.hourly("bitcoin", START, START + DAY).height == 24


class TestTheNowPoint:
    @pytest.fixture
    def ask(self, wire: Any) -> Callable[[datetime], CoinGeckoClient]:
        """A client for which it is the given time."""
        return lambda now: make(wire, now=lambda: now)

    @pytest.mark.parametrize("age", [timedelta(0), timedelta(minutes=4, seconds=50), -timedelta(seconds=3)])
    def test_is_dropped(self, wire: Any, ask: Callable[[datetime], CoinGeckoClient], age: timedelta) -> None:
        """As old as the API keeps an answer, or of a clock that is a little ahead."""
        wire.points["bitcoin", "hourly"] = [point(START + n * HOUR) for n in range(24)]
        moment = START + 10 * HOUR + timedelta(minutes=13, seconds=29)
        wire.now_point = point(moment)
        got = ask(moment + age).hourly("bitcoin", START, START + DAY)
        assert got["timestamp"][-1] == START + 10 * HOUR

    def test_the_last_point_of_an_answer_is_kept_when_it_is_not_now(
        self, wire: Any, ask: Callable[[datetime], CoinGeckoClient]
    ) -> None:
        """A range that ends in the past has no "now" point, and a live answer may lack it."""
        last = START + 20 * HOUR + timedelta(minutes=4, seconds=12)
        wire.points["bitcoin", "hourly"] = [point(START + n * HOUR + timedelta(minutes=4, seconds=12)) for n in range(21)]
        for now in (last + timedelta(minutes=26), last + 40 * DAY):
            assert ask(now).hourly("bitcoin", START, START + DAY)["timestamp"][-1] == START + 20 * HOUR

    def test_is_dropped_where_its_own_hour_has_no_point_yet(self, wire: Any, ask: Callable[[datetime], CoinGeckoClient]) -> None:
        wire.points["bitcoin", "hourly"] = [point(START)]
        wire.now_point = point(START + HOUR + timedelta(seconds=3))
        client = ask(START + HOUR + timedelta(seconds=4))
        assert client.hourly("bitcoin", START, START + DAY)["timestamp"].to_list() == [START]

    def test_is_dropped_from_days(self, wire: Any, ask: Callable[[datetime], CoinGeckoClient]) -> None:
        wire.points["bitcoin", "daily"] = [point(START), point(START + DAY)]
        wire.now_point = point(START + 2 * DAY + timedelta(hours=14, minutes=39))
        client = ask(START + 2 * DAY + timedelta(hours=14, minutes=40))
        assert client.daily("bitcoin", START, START + 5 * DAY)["timestamp"].to_list() == [START, START + DAY]

    def test_is_dropped_where_it_steps_back(self, wire: Any, client: CoinGeckoClient) -> None:
        regular = START + timedelta(minutes=59, milliseconds=955)
        wire.points["bitcoin", "hourly"] = [point(regular, 1.0), point(regular - timedelta(milliseconds=955), 2.0)]
        got = client.hourly("bitcoin", START, START + DAY)
        assert (got["price"].to_list(), got["available_at"].to_list()) == ([1.0], [regular + timedelta(minutes=5)])

    def test_just_after_the_range_takes_nothing_from_it(self, wire: Any, client: CoinGeckoClient) -> None:
        wire.points["bitcoin", "hourly"] = [point(START + n * HOUR + timedelta(seconds=40)) for n in range(24)]
        wire.now_point = point(START + DAY + timedelta(minutes=10))
        assert client.hourly("bitcoin", START, START + DAY).height == 24


def test_nulls_stay_null(wire: Any, client: CoinGeckoClient) -> None:
    wire.points["bitcoin", "daily"] = [(ms(START), 1.0, None, 0), (ms(START + DAY), None, None, None), point(START + 2 * DAY)]
    got = client.daily("bitcoin", START, START + 2 * DAY)
    assert got.select("price", "market_cap", "total_volume").rows() == [(1.0, None, 0.0), (None, None, None)]


def test_the_arrays_are_joined_by_time(wire: Any, client: CoinGeckoClient) -> None:
    first, second, third = (ms(START + n * DAY) for n in range(3))
    wire.says(
        200, {"prices": [[first, 1], [second, 2]], "market_caps": [[second, 20], [third, 30]], "total_volumes": [[first, 100]]}
    )
    got = client.daily("bitcoin", START, START + 3 * DAY)
    assert got.select("price", "market_cap", "total_volume").rows() == [(1, None, 100), (2, 20, None), (None, 30, None)]


def test_the_end_is_exclusive(wire: Any, client: CoinGeckoClient) -> None:
    wire.points["bitcoin", "daily"] = [point(START + n * DAY) for n in range(4)]
    assert client.daily("bitcoin", START + DAY, START + 3 * DAY)["timestamp"].to_list() == [START + DAY, START + 2 * DAY]


def test_a_long_hourly_range_takes_few_requests_and_loses_nothing(wire: Any, client: CoinGeckoClient) -> None:
    wire.points["bitcoin", "hourly"] = [point(START + n * HOUR + timedelta(seconds=n % 90)) for n in range(24 * 201)]
    got = client.hourly("bitcoin", START, START + 200 * DAY)
    assert got["timestamp"].to_list() == [START + n * HOUR for n in range(24 * 200)]
    assert len(wire.requests) == 3
    assert all(int(r.query["to"]) - int(r.query["from"]) <= 90 * 86_400 for r in wire.requests)


def test_a_range_cut_anywhere_is_the_same_range(wire: Any, client: CoinGeckoClient) -> None:
    wire.points["bitcoin", "hourly"] = [point(START + n * HOUR + timedelta(seconds=n * 97 % 3600)) for n in range(24 * 4)]
    whole = client.hourly("bitcoin", START, START + 3 * DAY)
    days = [client.hourly("bitcoin", START + n * DAY, START + (n + 1) * DAY) for n in range(3)]
    assert_frame_equal(pl.concat(days), whole, check_exact=True)


def test_nothing_served_is_an_empty_frame(wire: Any, client: CoinGeckoClient) -> None:
    wire.points["bitcoin", "hourly"] = []
    assert client.hourly("bitcoin", START, START + DAY).schema == POINT_SCHEMA


def test_an_empty_interval_is_not_asked_for(wire: Any, client: CoinGeckoClient) -> None:
    assert client.daily("bitcoin", START, START).height == 0
    assert wire.requests == []


def test_the_all_time_high(wire: Any, client: CoinGeckoClient) -> None:
    wire.says(200, {"market_data": {"ath": {"usd": 64805}, "ath_date": {"usd": "2021-04-14T11:54:46.763Z"}}})
    assert client.all_time_high("bitcoin") == (64805.0, datetime(2021, 4, 14, 11, 54, 46, 763000, tzinfo=UTC))


def test_a_coin_without_an_all_time_high_is_an_error(wire: Any, client: CoinGeckoClient) -> None:
    wire.says(200, {"market_data": {"ath": {}}})
    with pytest.raises(MarketDataError, match=r"/coins/bitcoin has no market_data\.ath\.usd"):
        client.all_time_high("bitcoin")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prices": [[1]]}, r"'prices' holds \[1\], expected \[UNIX milliseconds, number or null\]"),
        ({"prices": [["soon", 1]]}, "'prices' holds"),
        ({"prices": [[float("inf"), 1]]}, "'prices' holds"),
        ({"prices": [[10**30, 1]]}, "'prices' holds"),
        ({"prices": [[1746403200000, "much"]]}, "'prices' holds"),
    ],
)
def test_an_answer_of_another_shape_is_refused(wire: Any, client: CoinGeckoClient, body: Any, said: str) -> None:
    wire.says(200, {"market_caps": [], "total_volumes": [], **body})
    with pytest.raises(MarketDataError, match=said):
        client.daily("bitcoin", START, START + DAY)


@pytest.mark.parametrize("lacks", ["prices", "market_caps", "total_volumes"])
def test_an_answer_that_lacks_an_array_is_asked_for_again(wire: Any, client: CoinGeckoClient, lacks: str) -> None:
    wire.points["bitcoin", "daily"] = [point(START)]
    wire.says(200, {name: [] for name in ("prices", "market_caps", "total_volumes") if name != lacks})
    assert client.daily("bitcoin", START, START + DAY).height == 1


def test_points_lost_to_a_stamp_from_the_future_are_told(
    wire: Any, client: CoinGeckoClient, caplog: pytest.LogCaptureFixture
) -> None:
    wire.points["bitcoin", "daily"] = [point(START + n * DAY) for n in (0, 4, 1, 2, 3)]
    assert client.daily("bitcoin", START, START + 4 * DAY).height == 1
    assert "bitcoin daily from 2025-05-05 00:00: 3 stamps of 'prices' do not rise and were dropped" in caplog.text


def test_what_cannot_be_true_is_refused(wire: Any, client: CoinGeckoClient) -> None:
    wire.points["bitcoin", "daily"] = [point(START, -5.0), point(START + DAY)]
    with pytest.raises(QualityError, match=r"row 0 \(2025-05-05T00:00:00Z\), column 'price': -5.0 is below 0"):
        client.daily("bitcoin", START, START + DAY)


def test_the_real_daily_history_comes_back_whole(wire: Any, client: CoinGeckoClient, market_data_dir: Path | None) -> None:
    """Six real points of Bitcoin's history lie off midnight, two days are absent, one cap is null."""
    if market_data_dir is None:
        stamps = [START + n * DAY + timedelta(minutes=5 * (n % 7 == 3)) for n in range(61) if n != 20]
        served = [(ms(s), 1.0 + n, None if n == 9 else 1.0, 1.0) for n, s in enumerate(stamps)]
    else:
        served = [(ms(r[0]), *r[1:]) for r in pl.read_parquet(market_data_dir / "daily" / "bitcoin.parquet").iter_rows()]
    wire.points["bitcoin", "daily"] = served
    first, last = (datetime.fromtimestamp(served[n][0] / 1000, UTC) for n in (0, -1))
    got = client.daily("bitcoin", first, last + DAY)
    assert got.select("price", "market_cap", "total_volume").rows() == [r[1:] for r in served]
    assert got["timestamp"].to_list() == [datetime.fromtimestamp(r[0] // 86_400_000 * 86_400, UTC) for r in served]
    assert len(wire.requests) == 1
