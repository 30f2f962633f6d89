"""One HTTP layer for both APIs: a time limit on everything, bounded retries, a rate limit, one error, no key in messages."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import quote, quote_plus, urlencode, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from crpbot_lib.market_data.frames import utc_now
from crpbot_lib.market_data.limiter import LONGEST_PAUSE, RateLimiter

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0
TOTAL = 3
"""A whole answer may take this many times the read timeout: a server that sends a byte now and then would never hit that one."""
LARGEST_ANSWER = 64 << 20
ATTEMPTS = 10
"""Enough to sit out two minutes of an exchange that is down, and one request in five that fails."""
LONGEST_BACKOFF = 30.0
LONGEST_TEXT = 20_000
"""Characters of an answer that are looked at for what it says."""
CONNECTIONS = 16


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


class HttpClient:
    """GET of JSON objects from one API; safe to share between threads.

    ``secrets`` are blotted out of every message, should an answer echo them. ``backoff`` is the first pause between two tries, in
    seconds; ``sleep`` waits for it, tests inject one. An answer is waited for ``timeout`` seconds a byte and TOTAL times that
    as a whole.
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
        backoff: float = 1.0,
        timeout: float = READ_TIMEOUT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._service, self._base = service, base_url.rstrip("/")
        self._limiter, self._hint, self._sleep, self._backoff = limiter, hint, sleep, backoff
        written = {form for s in secrets if s for form in (s, quote(s, safe=""), quote_plus(s), json.dumps(s)[1:-1])}
        self._secret = re.compile("|".join(map(re.escape, sorted(written, key=len, reverse=True))), re.I) if written else None
        self._longest_secret = max(map(len, written), default=0)
        self._timeout, self._total = (min(CONNECT_TIMEOUT, timeout), timeout), TOTAL * timeout
        # Coinbase marks candles as cacheable for minutes although they change; intermediaries must be told not to believe it
        self._headers = {"Accept": "application/json", "Cache-Control": "no-cache", **(headers or {})}
        self._session, self._process = self._connections(), os.getpid()

    def _connections(self) -> requests.Session:
        session = _Session()
        session.mount("http://", _Adapter(self._total))
        session.mount("https://", _Adapter(self._total))
        # threads share the session: cookies would be its only state, and nothing here needs them
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        session.headers.update(self._headers)
        return session

    def rest(self, attempt: int) -> float:
        """Pauses after the ``attempt``-th failure (from 1): longer each time, with jitter. Returns the seconds."""
        seconds = random.uniform(0.5, 1.0) * min(LONGEST_BACKOFF, self._backoff * 2.0 ** (attempt - 1))
        self._sleep(seconds)
        return seconds

    def get(self, path: str, params: Mapping[str, str | int], *, holds: Mapping[str, type] | None = None) -> dict[str, Any]:
        """The JSON object at ``path``, with the fields and their types that ``holds`` names.

        Transient failures (no connection, a time limit, 408, 425, 429, 5xx, a body that is not JSON or is cut short, a 200 that
        lacks a field, or has an error inside that is not the request's fault) are tried again with growing, jittered pauses.
        Retry-After pauses every process that shares the limit. MarketDataError after the last try, or at once for what would
        fail again.
        """
        for attempt in range(1, ATTEMPTS + 1):
            self._limiter.wait()
            answer = self._once(path, params, holds or {})
            if not isinstance(answer, MarketDataError):
                return answer
            if answer.retry_after is not None:
                self._limiter.pause(answer.retry_after)
            if answer.permanent:
                raise answer
            if (answer.retry_after or 0) > LONGEST_PAUSE:
                raise self._with(answer, f"it asks to wait {answer.retry_after:.0f} s, try again after that")
            if attempt == ATTEMPTS:
                raise self._with(answer, f"gave up after {ATTEMPTS} tries, try again later")
            log.warning("%s; try %d of %d follows%s", answer, attempt + 1, ATTEMPTS, _after(answer))
            self.rest(attempt)
        raise AssertionError("unreachable: the last try returns or raises")

    def _once(self, path: str, params: Mapping[str, str | int], holds: Mapping[str, type]) -> dict[str, Any] | MarketDataError:
        """An answer, or the error that it is. Returned rather than raised where requests' exception is at hand: that one holds the
        request with its headers, the key among them, and would hang on ours as its context."""
        request = self.clean(f"{self._service}: GET {path}?{urlencode(params)}")
        if self._process != os.getpid():
            # a forked process must not read from its parent's connections
            self._session, self._process = self._connections(), os.getpid()
        deadline = time.monotonic() + self._total
        try:
            # auth: no .netrc is asked
            with self._session.get(self._base + path, params=params, timeout=self._timeout, stream=True, auth=_no_auth) as response:
                status, retry_after = response.status_code, response.headers.get("Retry-After")
                data = self._body(response, deadline)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            return MarketDataError(f"{request} failed: {self.clean(f'{type(error).__name__}: {error}')}")
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            body = None
        lacks = ""
        if status == 200 and isinstance(body, dict) and not _says_error(body):
            absent = [name for name, kind in holds.items() if not isinstance(body.get(name), kind)]
            if not absent:
                return body
            lacks = f"no {holds[absent[0]].__name__} {absent[0]!r} in "
        code, said = _explain(body) if isinstance(body, (dict, list)) else (None, data.decode("utf-8", "replace"))
        if status == 200 and body is None:
            said = f"a body that is not JSON, {len(data)} bytes: {said}"
        hint = self._hint(status, code)
        shown = f"{status}{'' if code in (None, status) else f', code {code}'}: {lacks}{self.clean(said) or 'nothing'}"
        return MarketDataError(
            f"{request} answered {shown}{f'; {hint}' if hint else ''}",
            permanent=not _may_pass(status, code, body),
            status=status,
            code=code,
            retry_after=_retry_after(retry_after),
        )

    def _body(self, response: requests.Response, deadline: float) -> bytes:
        data = bytearray()
        while chunk := response.raw.read1(1 << 16, decode_content=True):
            data += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole answer within {self._total:.1f} s")
            if len(data) > LARGEST_ANSWER:
                raise OSError(f"an answer of more than {LARGEST_ANSWER >> 20} MiB")
        return bytes(data)

    def clean(self, text: str, length: int = 300) -> str:
        """``text`` without secrets, markup and line breaks, and no longer than ``length``: fit for an error or a log line. Give it
        whole: what is cut before may end within a secret."""
        if len(text) > LONGEST_TEXT:
            # what the cut leaves of a secret at its end goes too
            text = self._blot(text[:LONGEST_TEXT])[: -self._longest_secret - 1]
        text = re.sub(r"<(script|style)\b.*?</\1>|<[^<>]*>", " ", self._blot(text), flags=re.I | re.S)
        # what no terminal should be sent, and no file can be written with: control characters, half of a surrogate pair
        text = self._blot(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
        return text if len(text) <= length else f"{text[:length]}…"

    def _blot(self, text: str) -> str:
        return self._secret.sub("***", text) if self._secret else text

    @staticmethod
    def _with(error: MarketDataError, advice: str) -> MarketDataError:
        return MarketDataError(f"{error}; {advice}", status=error.status, code=error.code, retry_after=error.retry_after)


class _Session(requests.Session):
    """Knows no redirects: one could carry the key to another host. Told only not to follow them, requests still reads a redirect's
    body, however long, and trips over an address that is none."""

    def get_redirect_target(self, resp: requests.Response) -> None:  # noqa: ARG002  # requests' signature
        return None


class _Adapter(HTTPAdapter):
    """Cuts a connection whose status and headers are not there in time; a socket's own time limit begins anew with every byte."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        super().__init__(pool_maxsize=CONNECTIONS)

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if not hasattr(pool.ConnectionCls, "answer_within"):
            pool.ConnectionCls = type("Limited", (_Limited, pool.ConnectionCls), {"answer_within": self._seconds})
        return pool


class _Limited:
    """A mixin of urllib3's connections."""

    answer_within: float
    sock: socket.socket | None

    def getresponse(self, *args: Any, **kwargs: Any) -> Any:
        sock = self.sock
        cut = threading.Event()

        def late() -> None:
            cut.set()
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.answer_within, late)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse(*args, **kwargs)  # type: ignore[misc]  # of the class that this is mixed into
        finally:
            timer.cancel()
            # also where it succeeded: a cut may look like the end of the headers (urllib3 would rewrite a TimeoutError)
            if cut.is_set():
                raise OSError(f"no whole answer within {self.answer_within:.1f} s")


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def checked_url(service: str, url: str, setting: str) -> str:
    """``url``, if it is an http(s) address without user, password or query; ValueError, which does not repeat what may be a key."""
    parts = urlsplit(url)
    if "@" in url or parts.query or parts.fragment:
        raise ValueError(
            f"the address of {service} ({setting}) holds a user, a password or a query: give scheme, host and path only; "
            "a key has a setting of its own"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"the address of {service} ({setting}) is {url!r}: expected http://… or https://…")
    return url


def limiter_name(service: str, url: str) -> str:
    """The name of the limit that all clients of this API share: the service and where it answers."""
    return f"{service}-{urlsplit(url).netloc}".lower()


def _after(error: MarketDataError) -> str:
    return "" if error.retry_after is None else f" after the {error.retry_after:.0f} s that it asks to wait"


def _may_pass(status: int, code: int | None, body: Any) -> bool:
    """Whether the same request may succeed later."""
    if status >= 300:
        return status in (408, 425, 429) or status >= 500
    if body is None:
        return True
    # a success that is an error all the same: only a code of the 4xx, or one of CoinGecko's own (10002 …), blames the request
    return isinstance(body, dict) and (code is None or code < 400 or code in (408, 425, 429) or 500 <= code < 600)


def _says_error(body: dict[str, Any]) -> bool:
    """Whether an answer with status 200 is an error all the same."""
    status = body.get("status")
    return bool(
        any(body.get(name) for name in ("error", "errors", "error_code", "message"))
        or (isinstance(status, dict) and "error_code" in status)
    )


def _explain(body: Any) -> tuple[int | None, str]:
    """(the API's own code, its words) of an error body, in any of the shapes that the two APIs are known to use.

    CoinGecko: ``error`` a string; ``status`` a number beside it; ``status`` an object with code and message; the same one
    level down under ``error``; the code at the top and the message under ``status``. Coinbase: ``error`` with ``message`` or
    ``error_details``, ``message`` alone, a list ``errors``.
    """
    for _ in range(8):
        if isinstance(body, list) and body:
            body = body[0]
        elif isinstance(body, dict) and isinstance(body.get("error"), dict):
            body = body["error"]
        elif isinstance(body, dict) and isinstance(body.get("errors"), list) and body["errors"]:
            body = body["errors"][0]
    if not isinstance(body, dict):
        return None, "an empty list" if body == [] else str(body)
    status = body.get("status")
    inner = status if isinstance(status, dict) else {}
    code = body.get("error_code", inner.get("error_code", status))
    words = [body.get("error"), body.get("error_details"), body.get("message"), inner.get("error_message")]
    said = ": ".join(dict.fromkeys(str(w) for w in words if w))
    return (code if type(code) is int else None), said or json.dumps(body)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None for none or nonsense."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - utc_now()).total_seconds()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
