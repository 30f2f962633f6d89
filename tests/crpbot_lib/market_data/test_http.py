"""Any answer of the two APIs ends as a JSON object or as one clear error, in bounded time, and never shows the key."""

from __future__ import annotations

import json
import socket
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from crpbot_lib.market_data import CoinbaseClient, CoinGeckoClient, MarketDataError
from crpbot_lib.market_data.http import ATTEMPTS, HttpClient, RateLimiter, shared_limiter

KEY = "CG-a-key-that-nobody-may-see"


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def client(wire: Any, pauses: list[float]) -> HttpClient:
    return make(wire.url, pauses)


def make(url: str, pauses: list[float], **options: Any) -> HttpClient:
    limiter = RateLimiter(1e6)
    headers = {"x-cg-pro-api-key": KEY}
    return HttpClient("CoinGecko", url, limiter=limiter, headers=headers, secrets=[KEY], sleep=pauses.append, **options)


def truncated(handler: BaseHTTPRequestHandler) -> None:
    """Promises more than it sends, and hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"candles": [')
    handler.close_connection = True


def trickling(handler: BaseHTTPRequestHandler) -> None:
    """Sends a byte now and then, so that no single read takes long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.close_connection = True
    try:
        for _ in range(200):
            handler.wfile.write(b" ")
            time.sleep(0.02)
    except OSError:
        return


class TestRetries:
    def test_passing_failures_are_tried_again(self, wire: Any, client: HttpClient, pauses: list[float]) -> None:
        wire.says(503, "<html><h1>Service unavailable</h1></html>")
        wire.script.append(truncated)
        wire.says(200, '{"candles": [')
        wire.says(429, {"errors": [{"id": "rate_limit_exceeded", "message": "Too many requests"}]})
        wire.says(200, {"candles": []})
        assert client.get("/x", {}) == {"candles": []}
        assert len(pauses) == 4

    def test_pauses_grow_and_are_jittered(self, wire: Any, client: HttpClient, pauses: list[float]) -> None:
        for _ in range(ATTEMPTS):
            wire.says(500, {"status": 500, "error": "Internal Server Error"})
        with pytest.raises(MarketDataError, match=f"Internal Server Error; gave up after {ATTEMPTS} tries"):
            client.get("/x", {})
        assert len(wire.requests) == ATTEMPTS
        assert all(2**n / 2 <= pause <= 2**n for n, pause in enumerate(pauses))
        assert any(pause != 2**n for n, pause in enumerate(pauses))

    def test_retry_after_is_honoured(self, wire: Any, client: HttpClient, pauses: list[float]) -> None:
        wire.says(429, {"status": {"error_code": 429, "error_message": "Rate Limit"}}, Retry_After="119")
        wire.says(200, {"ok": 1})
        client.get("/x", {})
        assert 119 <= pauses[0] <= 120

    def test_retry_after_may_be_a_date(self, wire: Any, client: HttpClient, pauses: list[float]) -> None:
        wire.says(429, {}, Retry_After="Thu, 29 Sep 2022 16:19:13 GMT")
        wire.says(200, {"ok": 1})
        client.get("/x", {})
        assert 0 <= pauses[0] <= 1

    def test_an_hour_is_not_waited_for(self, wire: Any, client: HttpClient, pauses: list[float]) -> None:
        wire.says(429, {}, Retry_After="3600")
        with pytest.raises(MarketDataError, match="asks to wait 3600 s"):
            client.get("/x", {})
        assert pauses == []

    def test_what_would_fail_again_is_not_tried_again(self, wire: Any, client: HttpClient, pauses: list[float]) -> None:
        wire.says(404, {"error": "NOT_FOUND", "message": "Product NOPE-USD not supported"})
        with pytest.raises(MarketDataError, match="answered 404: NOT_FOUND: Product NOPE-USD not supported") as error:
            client.get("/x", {"a": 1})
        assert error.value.permanent
        assert (error.value.status, len(wire.requests), pauses) == (404, 1, [])

    def test_nobody_listening(self, pauses: list[float]) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            with pytest.raises(MarketDataError, match="failed: ConnectionError") as error:
                make(f"http://127.0.0.1:{port}", pauses).get("/x", {})
        assert not error.value.permanent


class TestTimeLimits:
    def test_a_silent_server(self, wire: Any, pauses: list[float]) -> None:
        wire.script.append(lambda _handler: time.sleep(0.5))
        wire.says(200, {"ok": 1})
        assert make(wire.url, pauses, read_timeout=0.1).get("/x", {}) == {"ok": 1}
        assert len(pauses) == 1

    def test_a_server_that_sends_a_byte_now_and_then(self, wire: Any, pauses: list[float]) -> None:
        wire.script.append(trickling)
        wire.says(200, {"ok": 1})
        began = time.monotonic()
        assert make(wire.url, pauses, read_timeout=1, total_timeout=0.1).get("/x", {}) == {"ok": 1}
        assert time.monotonic() - began < 2


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


def test_the_recorded_errors_are_one_clear_error_each(wire: Any, market_data_dir: Path | None, pauses: list[float]) -> None:
    samples = (
        [] if market_data_dir is None else [json.loads(p.read_text()) for p in market_data_dir.parent.glob("api_samples/*.json")]
    )
    quoted = [e for s in samples if s["status"] is None for e in (s["body"] if isinstance(s["body"], list) else []) if "body" in e]
    errors = [s for s in samples if isinstance(s["status"], int) and s["status"] >= 400] + quoted
    client = make(wire.url, pauses)
    for sample in errors:
        for _ in range(ATTEMPTS):
            wire.says(sample["status"] or 400, sample["body"])
        with pytest.raises(MarketDataError) as error:
            client.get("/x", {})
        wire.script.clear()
        assert error.value.status == (sample["status"] or 400)
        assert error.value.permanent == (error.value.status not in (429, 500))
    assert market_data_dir is None or len(errors) >= 12


def test_a_429_inside_a_200_is_tried_again(wire: Any, client: HttpClient) -> None:
    wire.says(200, {"status": {"error_code": 429, "error_message": "Rate Limit"}})
    wire.says(200, {"ok": 1})
    assert client.get("/x", {}) == {"ok": 1}


class TestTheKey:
    def test_travels_in_the_header_only(self, wire: Any) -> None:
        wire.points["bitcoin", "daily"] = []
        wire.says(404, {"error": "coin not found"})
        with pytest.raises(MarketDataError):
            CoinGeckoClient(wire.url, KEY).all_time_high("bitcoin")
        [request] = wire.requests
        assert request.headers["x-cg-pro-api-key"] == KEY
        assert KEY not in str(request.query) + request.path

    def test_is_blotted_out_of_an_answer_that_echoes_it(
        self, wire: Any, client: HttpClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(ATTEMPTS):
            wire.says(500, f"you sent {KEY}")
        with pytest.raises(MarketDataError, match=r"you sent \*\*\*") as error:
            client.get("/x", {})
        assert KEY not in str(error.value) + caplog.text
        assert error.value.__cause__ is None


class TestRateLimit:
    def test_turns_are_evenly_spaced(self) -> None:
        slept: list[float] = []
        limiter = RateLimiter(10, clock=lambda: 100.0, sleep=slept.append)
        for _ in range(4):
            limiter.wait()
        assert slept == pytest.approx([0.1, 0.2, 0.3])

    def test_one_limiter_for_all_clients_of_an_api(self) -> None:
        assert shared_limiter("http://a", 10) is shared_limiter("http://a", 10)
        assert shared_limiter("http://a", 10) is not shared_limiter("http://b", 10)


def test_no_answer_may_come_from_a_cache(wire: Any, client: HttpClient) -> None:
    wire.says(200, {"ok": 1})
    client.get("/x", {})
    assert wire.requests[0].headers["cache-control"] == "no-cache"


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the address of Coinbase is 'api\.coinbase\.com'"):
        CoinbaseClient("api.coinbase.com")
