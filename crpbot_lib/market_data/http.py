"""One HTTP layer for both APIs: a time limit on everything, bounded retries, a rate limit, one error, no key in messages."""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlencode, urlsplit

import requests
import urllib3

from crpbot_lib.market_data.frames import utc_now

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0
TOTAL_TIMEOUT = 90.0
"""Seconds for one answer: a server that sends a byte now and then would never hit the read timeout."""
ATTEMPTS = 6
LONGEST_BACKOFF = 30.0
LONGEST_RETRY_AFTER = 300.0


class MarketDataError(Exception):
    """The market data cannot be had or cannot be trusted; the message names the source, the value and what to do.

    ``permanent``: the same request would fail again, so a retry is useless. ``status`` is the HTTP status and ``code`` the
    API's own error code, where there was one; ``retry_after`` the seconds that the server asked to wait.
    """

    def __init__(
        self,
        message: str,
        *,
        permanent: bool = False,
        status: int | None = None,
        code: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.status = status
        self.code = code
        self.retry_after = retry_after


Hint = Callable[[int, int | None], str]
"""What to do about (HTTP status, the API's own code); "" where nothing is known."""


class RateLimiter:
    """Evenly spaced turns for the threads of this process: at most ``per_second`` of them."""

    def __init__(
        self, per_second: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._spacing = 1.0 / per_second
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        """Returns when it is this caller's turn."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._spacing
        if turn > now:
            self._sleep(turn - now)


_limiters: dict[tuple[str, float], RateLimiter] = {}
_limiters_lock = threading.Lock()


def shared_limiter(base_url: str, per_second: float) -> RateLimiter:
    """The process's one limiter of an API, however many clients are made."""
    with _limiters_lock:
        return _limiters.setdefault((base_url, per_second), RateLimiter(per_second))


class HttpClient:
    """GET of JSON objects from one API.

    ``secrets`` are blotted out of every message, should an answer echo them. ``sleep`` waits between tries; tests inject it.
    """

    def __init__(
        self,
        service: str,
        base_url: str,
        *,
        limiter: RateLimiter,
        headers: Mapping[str, str] | None = None,
        secrets: Sequence[str] = (),
        hint: Hint = lambda _status, _code: "",
        sleep: Callable[[float], None] = time.sleep,
        read_timeout: float = READ_TIMEOUT,
        total_timeout: float = TOTAL_TIMEOUT,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"the address of {service} is {base_url!r}: expected http://… or https://…")
        self._service, self._base = service, base_url.rstrip("/")
        self._limiter, self._hint, self._sleep = limiter, hint, sleep
        self._secrets = [s for s in secrets if s]
        self._timeout, self._total_timeout = (CONNECT_TIMEOUT, read_timeout), total_timeout
        self._session = requests.Session()
        # Coinbase marks candles as cacheable for minutes although they change; intermediaries must be told not to believe it
        self._session.headers.update({"Accept": "application/json", "Cache-Control": "no-cache", **(headers or {})})

    def get(self, path: str, params: Mapping[str, str | int]) -> dict[str, Any]:
        """The JSON object at ``path``. Transient failures (no connection, a time limit, 408, 425, 429, 5xx, a body that is
        not JSON or is cut short) are tried again with growing, jittered pauses, or after what Retry-After says; MarketDataError
        after the last try, or at once for what would fail again."""
        for attempt in range(1, ATTEMPTS + 1):
            self._limiter.wait()
            try:
                return self._once(path, params)
            except MarketDataError as error:
                if error.permanent:
                    raise
                if (error.retry_after or 0) > LONGEST_RETRY_AFTER:
                    raise self._error(f"{error}; it asks to wait {error.retry_after:.0f} s, try again after that", error) from None
                if attempt == ATTEMPTS:
                    raise self._error(f"{error}; gave up after {ATTEMPTS} tries, try again later", error) from None
                pause = random.uniform(0.5, 1.0) * min(LONGEST_BACKOFF, 2.0 ** (attempt - 1))
                if error.retry_after is not None:
                    pause = error.retry_after + random.uniform(0, 1)
                log.warning("%s; try %d of %d in %.1f s", error, attempt + 1, ATTEMPTS, pause)
                self._sleep(pause)
        raise AssertionError("unreachable: the last try returns or raises")

    def _once(self, path: str, params: Mapping[str, str | int]) -> dict[str, Any]:
        request = f"{self._service}: GET {path}?{urlencode(params)}"
        try:
            # a redirect could carry the key to another host, so it is an error and not followed
            with self._session.get(
                self._base + path, params=params, timeout=self._timeout, stream=True, allow_redirects=False
            ) as response:
                status, headers, data = response.status_code, response.headers, self._body(response)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            # not chained: the exceptions of requests hold the request with its headers, the key among them
            raise MarketDataError(self._clean(f"{request} failed: {type(error).__name__}: {error}")) from None

        try:
            body = json.loads(data)
        except ValueError:
            body = None
        if status == 200 and isinstance(body, dict) and not _says_error(body):
            return body
        code, said = _explain(body) if isinstance(body, (dict, list)) else (None, data.decode("utf-8", "replace"))
        if status == 200 and body is None:
            said = f"a body that is not JSON, {len(data)} bytes: {said}"
        failed_with = code if status == 200 and code is not None else status
        transient = failed_with in (408, 425, 429) or 500 <= failed_with < 600 or (status == 200 and body is None)
        hint = self._hint(status, code)
        detail = self._clean(f"{said or 'nothing'}")
        raise MarketDataError(
            f"{self._clean(request)} answered {status}{'' if code in (None, status) else f', code {code}'}: {detail}"
            + (f"; {hint}" if hint else ""),
            permanent=not transient,
            status=status,
            code=code,
            retry_after=_retry_after(headers.get("Retry-After")),
        )

    def _body(self, response: requests.Response) -> bytes:
        deadline = time.monotonic() + self._total_timeout
        chunks: list[bytes] = []
        while chunk := response.raw.read1(1 << 16, decode_content=True):
            chunks.append(chunk)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole answer within {self._total_timeout:.0f} s")
        return b"".join(chunks)

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)).strip()
        return text if len(text) <= 300 else f"{text[:300]}…"

    @staticmethod
    def _error(message: str, like: MarketDataError) -> MarketDataError:
        return MarketDataError(message, status=like.status, code=like.code, retry_after=like.retry_after)


def _says_error(body: dict[str, Any]) -> bool:
    """Whether an answer with status 200 is an error all the same."""
    status = body.get("status")
    return bool(
        body.get("error") or body.get("errors") or body.get("error_code") or (isinstance(status, dict) and "error_code" in status)
    )


def _explain(body: Any) -> tuple[int | None, str]:
    """(the API's own code, its words) of an error body, in any of the shapes that the two APIs are known to use.

    CoinGecko: ``error`` a string; ``status`` a number beside it; ``status`` an object with code and message; the same one
    level down under ``error``; the code at the top and the message under ``status``. Coinbase: ``error`` with ``message`` or
    ``error_details``, ``message`` alone, a list ``errors``.
    """
    if isinstance(body, list):
        return _explain(body[0]) if body else (None, "an empty list")
    if not isinstance(body, dict):
        return None, str(body)
    if isinstance(body.get("error"), dict):
        return _explain(body["error"])
    if isinstance(body.get("errors"), list) and body["errors"]:
        return _explain(body["errors"][0])
    status = body.get("status")
    inner = status if isinstance(status, dict) else {}
    code = body.get("error_code", inner.get("error_code", status))
    words = [body.get("error"), body.get("error_details"), body.get("message"), inner.get("error_message")]
    said = ": ".join(dict.fromkeys(str(w) for w in words if w))
    return (code if isinstance(code, int) else None), said or json.dumps(body)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None for none or nonsense."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - utc_now()).total_seconds())
    except (TypeError, ValueError):
        return None
