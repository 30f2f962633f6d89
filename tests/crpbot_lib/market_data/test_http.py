"""Any answer of the two APIs ends as a JSON object or as one clear error, in bounded time, and never shows the key."""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from crpbot_lib.market_data import CoinbaseClient, CoinGeckoClient, MarketDataError
from crpbot_lib.market_data.http import ATTEMPTS, LARGEST_ANSWER, HttpClient
from crpbot_lib.market_data.limiter import LONGEST_PAUSE

KEY = "CG-a+key/that-nobody-may-see"
Make = Callable[..., HttpClient]


class Limit:
    """A limiter that only notes what it was told."""

    def __init__(self) -> None:
        self.turns = 0
        self.pauses: list[float] = []

    def wait(self) -> None:
        self.turns += 1

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def limit() -> Limit:
    return Limit()


@pytest.fixture
def make(wire: Any, pauses: list[float], limit: Limit) -> Make:
    def client(url: str = wire.url, **options: Any) -> HttpClient:
        headers = {"x-cg-pro-api-key": KEY}
        return HttpClient("CoinGecko", url, limiter=limit, headers=headers, secrets=[KEY], sleep=pauses.append, **options)  # type: ignore[arg-type]

    return client


@pytest.fixture
def client(make: Make) -> HttpClient:
    return make()


def truncated(handler: BaseHTTPRequestHandler) -> None:
    """Promises more than it sends, and hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"candles": [')
    handler.close_connection = True


def slow_headers(handler: BaseHTTPRequestHandler) -> None:
    """A status line of which a byte comes now and then."""
    handler.close_connection = True
    try:
        for byte in b"HTTP/1.1 200 OK" + b" " * 200:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.02)
    except OSError:
        return


def trickling(handler: BaseHTTPRequestHandler, status: int = 200) -> None:
    """Sends a byte now and then, so that no single read takes long."""
    handler.send_response(status)
    handler.send_header("Location", "http://127.0.0.1:9/elsewhere")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.close_connection = True
    try:
        for _ in range(200):
            handler.wfile.write(b" ")
            time.sleep(0.02)
    except OSError:
        return


def trickling_redirect(handler: BaseHTTPRequestHandler) -> None:
    trickling(handler, 302)


class TestRetries:
    def test_passing_failures_are_tried_again(self, wire: Any, client: HttpClient, pauses: list[float]) -> None:
        wire.says(503, "<html><h1>Service unavailable</h1></html>")
        wire.script.append(truncated)
        wire.says(200, '{"candles": [')
        wire.says(429, {"errors": [{"id": "rate_limit_exceeded", "message": "Too many requests"}]})
        wire.says(200, {"candles": []})
        assert client.get("/x", {}) == {"candles": []}
        assert len(pauses) == 4

    def test_pauses_grow_and_are_jittered(self, wire: Any, client: HttpClient, pauses: list[float], limit: Limit) -> None:
        for _ in range(ATTEMPTS):
            wire.says(500, {"status": 500, "error": "Internal Server Error"})
        with pytest.raises(MarketDataError, match=f"Internal Server Error; gave up after {ATTEMPTS} tries"):
            client.get("/x", {})
        assert len(wire.requests) == limit.turns == ATTEMPTS
        assert all(min(2**n, 30) / 2 <= pause <= min(2**n, 30) for n, pause in enumerate(pauses))
        assert any(pause != 2**n for n, pause in enumerate(pauses))

    def test_the_first_pause_is_a_choice(self, wire: Any, make: Make, pauses: list[float]) -> None:
        wire.says(500, "")
        wire.says(200, {"ok": 1})
        make(backoff=0.01).get("/x", {})
        assert 0.005 <= pauses[0] <= 0.01

    @pytest.mark.parametrize("status", [429, 503])
    def test_retry_after_pauses_everybody(self, wire: Any, client: HttpClient, limit: Limit, status: int) -> None:
        wire.says(status, {"status": {"error_code": 429, "error_message": "Rate Limit"}}, Retry_After="119")
        wire.says(200, {"ok": 1})
        client.get("/x", {})
        assert limit.pauses == [119]

    @pytest.mark.parametrize(
        ("header", "seconds"),
        [
            ("Thu, 29 Sep 2022 16:19:13 GMT", [0]),
            ("2.5", [2.5]),
            ("-4", [0]),
            ("soon", []),
            ("nan", []),
            ("inf", []),
            ("Thu, 99 Sep 2022", []),
        ],
    )
    def test_retry_after_may_be_a_date_or_nonsense(
        self, wire: Any, client: HttpClient, limit: Limit, header: str, seconds: list[float]
    ) -> None:
        wire.says(429, {}, Retry_After=header)
        wire.says(200, {"ok": 1})
        client.get("/x", {})
        assert limit.pauses == seconds

    def test_an_hour_is_not_waited_for_but_told_to_the_others(
        self, wire: Any, client: HttpClient, pauses: list[float], limit: Limit
    ) -> None:
        wire.says(429, {}, Retry_After="3600")
        with pytest.raises(MarketDataError, match="asks to wait 3600 s"):
            client.get("/x", {})
        assert pauses == []
        assert limit.pauses == [3600]
        assert LONGEST_PAUSE < 3600

    def test_what_would_fail_again_is_not_tried_again(self, wire: Any, client: HttpClient, pauses: list[float]) -> None:
        wire.says(404, {"error": "NOT_FOUND", "message": "Product NOPE-USD not supported"})
        with pytest.raises(MarketDataError, match="answered 404: NOT_FOUND: Product NOPE-USD not supported") as error:
            client.get("/x", {"a": 1})
        assert error.value.permanent
        assert (error.value.status, len(wire.requests), pauses) == (404, 1, [])

    def test_nobody_listening(self, make: Make) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            with pytest.raises(MarketDataError, match="failed: ConnectionError") as error:
                make(f"http://127.0.0.1:{port}").get("/x", {})
        assert not error.value.permanent


class TestTimeLimits:
    def test_a_silent_server(self, wire: Any, make: Make, pauses: list[float]) -> None:
        wire.script.append(lambda _handler: time.sleep(0.5))
        wire.says(200, {"ok": 1})
        assert make(timeout=0.1).get("/x", {}) == {"ok": 1}
        assert len(pauses) == 1

    @pytest.mark.parametrize("answer", [trickling, trickling_redirect, slow_headers])
    def test_a_server_that_sends_a_byte_now_and_then(
        self, wire: Any, make: Make, answer: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        wire.script.append(answer)
        wire.says(200, {"ok": 1})
        assert make(timeout=0.1).get("/x", {}) == {"ok": 1}
        assert "no whole answer within 0.3 s" in caplog.text

    def test_an_answer_without_end(self, wire: Any, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("crpbot_lib.market_data.http.LARGEST_ANSWER", 1 << 20)
        for _ in range(ATTEMPTS):
            wire.says(200, "x" * (2 << 20))
        with pytest.raises(MarketDataError, match="an answer of more than 1 MiB"):
            make().get("/x", {})
        assert LARGEST_ANSWER == 64 << 20


SHAPES: list[tuple[str, int, Any, str]] = [
    ("error is a string", 422, {"error": "Missing parameter vs_currency"}, "answered 422: Missing parameter vs_currency"),
    ("status is a number", 400, {"status": 400, "error": "Bad"}, "answered 400: Bad"),
    (
        "status is an object",
        401,
        {"status": {"error_code": 10002, "error_message": "Key Missing"}},
        "401, code 10002: Key Missing; set CRP",
    ),
    (
        "one wrapper more",
        401,
        {"error": {"status": {"error_code": 10012, "error_message": "past 365 days"}}},
        "code 10012: past 365 days",
    ),
    (
        "code at the top",
        400,
        {"error_code": 10010, "status": {"error_message": "host"}},
        "code 10010: host; the key belongs to the other",
    ),
    (
        "a paid endpoint",
        401,
        {"status": {"error_code": 10005, "error_message": "limited to PRO"}},
        "limited to PRO; this needs a paid plan",
    ),
    ("error_details", 400, {"error": "INVALID_ARGUMENT", "error_details": "too many"}, "400: INVALID_ARGUMENT: too many"),
    ("only a message", 404, {"message": "NotFound"}, "answered 404: NotFound"),
    ("plain text", 401, "Unauthorized\n", "answered 401: Unauthorized"),
    ("a page", 403, "<html><title>Attention</title>\n<p>Cloudflare</p></html>", "answered 403: Attention Cloudflare"),
    ("nothing", 400, "", "answered 400: nothing"),
    ("an error in a 200", 200, {"error": {"status": {"error_code": 10012, "error_message": "past"}}}, "200, code 10012: past"),
    ("a list", 200, [[1, 2]], "answered 200"),
    ("a redirect", 302, "", "answered 302: nothing; check CRPBOT_COINGECKO_URL"),
]


@pytest.mark.parametrize(("status", "body", "said"), [pytest.param(*shape[1:], id=shape[0]) for shape in SHAPES])
def test_every_error_shape_is_one_clear_error(wire: Any, status: int, body: Any, said: str) -> None:
    wire.says(status, body, Location="http://127.0.0.1:9/elsewhere")
    with pytest.raises(MarketDataError) as error:
        CoinGeckoClient(wire.url, KEY).all_time_high("bitcoin")
    assert said in str(error.value)
    assert "/coins/bitcoin" in str(error.value)
    assert error.value.permanent
    assert len(wire.requests) == 1


def test_the_recorded_errors_are_one_clear_error_each(wire: Any, market_data_dir: Path | None, client: HttpClient) -> None:
    samples = (
        [] if market_data_dir is None else [json.loads(p.read_text()) for p in market_data_dir.parent.glob("api_samples/*.json")]
    )
    quoted = [e for s in samples if s["status"] is None for e in (s["body"] if isinstance(s["body"], list) else []) if "body" in e]
    errors = [s for s in samples if isinstance(s["status"], int) and s["status"] >= 400] + quoted
    for sample in errors:
        for _ in range(ATTEMPTS):
            wire.says(sample["status"] or 400, sample["body"])
        with pytest.raises(MarketDataError) as error:
            client.get("/x", {})
        wire.script.clear()
        assert error.value.status == (sample["status"] or 400)
        assert error.value.permanent == (error.value.status not in (429, 500))
    assert market_data_dir is None or len(errors) >= 12


def test_a_success_without_an_answer_is_tried_again(wire: Any, client: HttpClient) -> None:
    for status, body in [(202, {"accepted": True}), (204, ""), (206, '{"ok"')]:
        wire.says(status, body)
    wire.says(200, {"ok": 1})
    assert client.get("/x", {}) == {"ok": 1}


@pytest.mark.parametrize(
    "body",
    [
        {"status": {"error_code": 429, "error_message": "Rate Limit"}},
        {"status": 500, "error": "Internal Server Error"},
        {"error": "UNAVAILABLE", "message": "try again"},
        {"errors": [{"id": "internal", "message": "try again"}]},
        "<html>502 Bad Gateway</html>",
        "",
        "[" * 100_000,
    ],
    ids=lambda body: str(body)[:20],
)
def test_a_passing_error_inside_a_200_is_tried_again(wire: Any, client: HttpClient, body: Any) -> None:
    wire.says(200, body)
    wire.says(200, {"ok": 1})
    assert client.get("/x", {}) == {"ok": 1}


class TestTheKey:
    def test_travels_in_the_header_only(self, wire: Any) -> None:
        wire.says(404, {"error": "coin not found"})
        with pytest.raises(MarketDataError):
            CoinGeckoClient(wire.url, KEY).all_time_high("bitcoin")
        [request] = wire.requests
        assert request.headers["x-cg-pro-api-key"] == KEY
        assert KEY not in str(request.query) + request.path

    @pytest.mark.parametrize("form", [KEY, quote(KEY, safe=""), quote(KEY, safe="").lower(), KEY.upper(), f"<b>{KEY}</b>"])
    @pytest.mark.parametrize("status", [200, 401, 429, 500])
    def test_is_blotted_out_of_an_answer_that_echoes_it(
        self, wire: Any, client: HttpClient, caplog: pytest.LogCaptureFixture, status: int, form: str
    ) -> None:
        caplog.set_level(logging.DEBUG)
        for body in [f"you sent {form}", {"error": f"you sent {form}"}, {"status": {"error_code": 500, "error_message": form}}] * 4:
            wire.says(status, body)
        with pytest.raises(MarketDataError, match=r"\*\*\*") as error:
            client.get("/x", {})
        shown = (str(error.value) + caplog.text).lower()
        assert not [f for f in (KEY, quote(KEY, safe="")) if f.lower() in shown]
        assert error.value.__cause__ is None
        assert error.value.__context__ is None

    @pytest.mark.parametrize("before", [*range(240, 330, 10), 19_950, 19_990])
    def test_is_not_shown_in_part_where_a_long_answer_is_cut(self, wire: Any, client: HttpClient, before: int) -> None:
        for body in ["x" * before + KEY * 3, json.dumps(["<p>" * (before // 3) + KEY]), {"error": "x" * before + KEY}]:
            wire.says(403, body)
            with pytest.raises(MarketDataError) as error:
                client.get("/x", {})
            assert KEY[:6] not in str(error.value)

    @pytest.mark.parametrize(
        "body",
        [
            {"prices": [[KEY, 1]], "market_caps": [], "total_volumes": []},
            {"prices": [[1, f"{'x' * 80}{KEY}"]], "market_caps": [], "total_volumes": []},
            {"prices": KEY},
            {"market_data": {"ath": {"usd": KEY}, "ath_date": {}}},
            {"market_data": {"ath": {"usd": 1}, "ath_date": {"usd": KEY}}},
            {"market_data": KEY},
        ],
    )
    def test_is_blotted_out_of_values_that_are_refused(self, wire: Any, body: Any) -> None:
        now, start = datetime(2025, 5, 6, tzinfo=UTC), datetime(2025, 5, 5, tzinfo=UTC)
        client = CoinGeckoClient(wire.url, KEY, now=lambda: now, requests_per_second=1e6, backoff=0.001)
        for ask in (lambda: client.daily("bitcoin", start, start + timedelta(days=1)), lambda: client.all_time_high("bitcoin")):
            for _ in range(ATTEMPTS):
                wire.says(200, body)
            with pytest.raises(MarketDataError) as error:
                ask()
            wire.script.clear()
            assert KEY[:6] not in str(error.value)
            assert error.value.__context__ is None

    def test_does_not_hang_on_the_error_of_a_connection_that_failed(self, make: Make) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            with pytest.raises(MarketDataError) as error:
                make(f"http://127.0.0.1:{unused.getsockname()[1]}").get("/x", {"note": KEY})
        assert (error.value.__cause__, error.value.__context__) == (None, None)
        assert KEY not in str(error.value)

    @pytest.mark.parametrize("key", ["CG-line\nbreak", "CG-two words", "CG-\u00fcmlaut", "CG-\u4e2d"])
    def test_that_no_header_can_hold_is_refused_without_being_shown(self, wire: Any, key: str) -> None:
        with pytest.raises(MarketDataError, match="CRPBOT_COINGECKO_API_KEY holds characters that no key has") as error:
            CoinGeckoClient(wire.url, key).all_time_high("bitcoin")
        assert key not in str(error.value)
        assert wire.requests == []

    def test_copied_with_its_line_break_is_the_key(self, wire: Any) -> None:
        wire.says(200, {"market_data": {"ath": {"usd": 1}, "ath_date": {"usd": "2021-04-14T11:54:46.763Z"}}})
        CoinGeckoClient(wire.url, f"{KEY}\n").all_time_high("bitcoin")
        assert wire.requests[0].headers["x-cg-pro-api-key"] == KEY

    @pytest.mark.parametrize("address", [f"https://user:{KEY}@host/api", f"https://host/api?x_cg_pro_api_key={KEY}"])
    def test_in_an_address_is_refused_without_being_shown(self, address: str) -> None:
        with pytest.raises(ValueError, match=r"CRPBOT_COINGECKO_URL\) holds a user, a password or a query") as error:
            CoinGeckoClient(address, None)
        assert KEY not in str(error.value)


@pytest.mark.parametrize("location", ["http://[", "/\xff\xfe", "http://127.0.0.1:9/elsewhere"])
def test_a_redirect_is_not_even_looked_at(wire: Any, client: HttpClient, location: str) -> None:
    wire.says(302, "moved", Location=location)
    with pytest.raises(MarketDataError, match="answered 302: moved") as error:
        client.get("/x", {})
    assert error.value.permanent


@pytest.mark.parametrize("text", ["\ud800", "\x9b31m", "\u202e", "\u2028"], ids=ascii)
def test_what_no_terminal_should_be_sent_is_left_out(wire: Any, client: HttpClient, text: str) -> None:
    wire.says(403, {"error": f"no{text}entry"})
    with pytest.raises(MarketDataError, match=r"403: no (31m)?entry"):
        client.get("/x", {})


def test_what_an_answer_says_is_one_line(wire: Any, client: HttpClient) -> None:
    wire.says(403, "<script>var a = 1</script><p>Access\n\r\n\x1b[31m denied</p>" + "x" * 9999)
    with pytest.raises(MarketDataError, match="403: Access") as error:
        client.get("/x\ny", {"a": "b\nc"})
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("text", ["<" * 2_000_000, "<script>" * 300_000, " " * 2_000_000, '{"a":' * 400_000])
def test_an_answer_made_to_be_slow_to_read_is_not(wire: Any, client: HttpClient, text: str) -> None:
    """Work that grows with the square of it would take minutes."""
    wire.says(403, text)
    with pytest.raises(MarketDataError, match="answered 403"):
        client.get("/x", {})


def test_an_error_survives_the_way_to_another_process(wire: Any, client: HttpClient) -> None:
    wire.says(404, {"error": "NOT_FOUND"})
    with pytest.raises(MarketDataError) as error:
        client.get("/x", {})
    other = pickle.loads(pickle.dumps(error.value))
    assert (str(other), other.permanent, other.status) == (str(error.value), True, 404)


def test_a_forked_process_reads_from_connections_of_its_own(wire: Any, client: HttpClient) -> None:
    for n in range(3):
        wire.says(200, {"n": n})
    client.get("/x", {})
    inherited = client._session
    if (child := os.fork()) == 0:
        client.get("/x", {})
        os._exit(0 if client._session is not inherited else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert client.get("/x", {}) == {"n": 2}


def test_cookies_are_not_kept(wire: Any, client: HttpClient) -> None:
    for _ in range(2):
        wire.says(200, {"ok": 1}, Set_Cookie="id=1; Path=/")
        client.get("/x", {})
    assert "cookie" not in wire.requests[1].headers


def test_no_answer_may_come_from_a_cache(wire: Any, client: HttpClient) -> None:
    wire.says(200, {"ok": 1})
    client.get("/x", {})
    assert wire.requests[0].headers["cache-control"] == "no-cache"


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the address of Coinbase \(CRPBOT_COINBASE_URL\) is 'api\.coinbase\.com': expected http"):
        CoinbaseClient("api.coinbase.com")
