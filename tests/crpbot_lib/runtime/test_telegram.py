"""Messages reach a Telegram server on loopback; the token reaches nothing else."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from pydantic import SecretStr

from crpbot_lib.config import Settings, TelegramSettings
from crpbot_lib.runtime import telegram

TOKEN = "123456:a-very-secret-token"


class BotApi:
    """What it was sent, and what it answers."""

    def __init__(self) -> None:
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.status, self.body = 200, b'{"ok": true}'
        self.url = ""

    @property
    def settings(self) -> TelegramSettings:
        return TelegramSettings(url=self.url, token=SecretStr(TOKEN), chat_id="42")


@pytest.fixture
def bot_api() -> Iterator[BotApi]:
    api = BotApi()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            api.received.append((self.path, json.loads(body)))
            self.send_response(api.status)
            self.end_headers()
            self.wfile.write(api.body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    api.url = f"http://127.0.0.1:{server.server_port}"
    yield api
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_message_arrives(bot_api: BotApi) -> None:
    telegram.send(bot_api.settings, "BTC-USD: long @ 65.3% (LSTM: 0.653)")

    assert bot_api.received == [(f"/bot{TOKEN}/sendMessage", {"chat_id": "42", "text": "BTC-USD: long @ 65.3% (LSTM: 0.653)"})]


def test_the_token_is_in_no_log_error_or_repr(bot_api: BotApi, caplog: pytest.LogCaptureFixture) -> None:
    bot_api.status, bot_api.body = 401, b'{"ok": false, "description": "Unauthorized"}'

    with caplog.at_level(logging.DEBUG), pytest.raises(telegram.TelegramError) as failure:
        telegram.send(bot_api.settings, "hello")

    assert str(failure.value) == f"{bot_api.url.removeprefix('http://')} answered 401 to sendMessage: Unauthorized"
    assert any("/bot***/sendMessage" in record.getMessage() for record in caplog.records), "urllib3 logs the path at DEBUG"
    for text in (caplog.text, repr(failure.value), repr(bot_api.settings), str(bot_api.settings)):
        assert "secret" not in text


def test_a_server_that_is_away_is_named_without_the_token(caplog: pytest.LogCaptureFixture) -> None:
    gone = TelegramSettings(url="http://127.0.0.1:1", token=SecretStr(TOKEN), chat_id="42")

    with caplog.at_level(logging.DEBUG), pytest.raises(telegram.TelegramError, match=r"127\.0\.0\.1:1 did not answer") as failure:
        telegram.send(gone, "hello")

    assert failure.value.__cause__ is None
    assert failure.value.__suppress_context__
    assert "secret" not in caplog.text + str(failure.value)


def test_notify_never_fails_what_has_happened_already(bot_api: BotApi) -> None:
    assert telegram.notify(Settings(telegram=bot_api.settings), "promoted") is True
    bot_api.status = 500
    assert telegram.notify(Settings(telegram=bot_api.settings), "promoted") is False
    assert telegram.notify(Settings(), "promoted") is False
    assert len(bot_api.received) == 2


def test_without_token_and_chat_nothing_is_sent() -> None:
    with pytest.raises(telegram.TelegramError, match=r"not configured: set CRPBOT_TELEGRAM__TOKEN"):
        telegram.send(TelegramSettings(chat_id="42"), "hello")
