"""Messages to a Telegram chat (Bot API, ``POST /bot<token>/sendMessage``). The token stands in the URL, so no URL is ever shown."""

from __future__ import annotations

import logging
import re
from urllib.parse import urlsplit

import requests

from crpbot_lib.config import Settings, TelegramSettings

logger = logging.getLogger(__name__)
TIMEOUT_SECONDS = 10.0


class TelegramError(Exception):
    """The message was not delivered; says why, without the token."""


class _HideToken(logging.Filter):
    """urllib3 logs the path of each request at DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"/bot[^/\s]+/", "/bot***/", record.getMessage()), ()
        return True


def enabled(settings: TelegramSettings) -> bool:
    """Whether a token and a chat are configured."""
    return settings.token is not None and settings.chat_id is not None


def notify(settings: Settings, text: str) -> bool:
    """Sends ``text`` where Telegram is configured; returns whether it was sent. A message that cannot be delivered is logged and
    ends nothing: what it tells has happened already."""
    if not enabled(settings.telegram):
        logger.info("Telegram is not configured; not sent: %s", text)
        return False
    try:
        send(settings.telegram, text)
    except TelegramError as error:
        logger.error("Telegram: %s; not sent: %s", error, text)
        return False
    return True


def send(settings: TelegramSettings, text: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
    """Sends ``text`` to the configured chat. TelegramError when it is not configured, not reachable or refuses."""
    if settings.token is None or settings.chat_id is None:
        raise TelegramError("Telegram is not configured: set CRPBOT_TELEGRAM__TOKEN and CRPBOT_TELEGRAM__CHAT_ID")
    _hide_token_in_logs()
    host = urlsplit(settings.url).netloc
    url = f"{settings.url.rstrip('/')}/bot{settings.token.get_secret_value()}/sendMessage"
    try:
        answer = requests.post(url, json={"chat_id": settings.chat_id, "text": text}, timeout=timeout, allow_redirects=False)
    except requests.RequestException as error:
        # neither the message nor the cause of requests' errors: both hold the URL
        raise TelegramError(f"{host} did not answer within {timeout:g} s: {type(error).__name__}") from None
    if answer.status_code != 200:
        raise TelegramError(f"{host} answered {answer.status_code} to sendMessage: {_description(answer)}")


def _description(answer: requests.Response) -> str:
    try:
        body = answer.json()
    except ValueError:
        return "no JSON in the answer"
    return str(body.get("description", "no description")) if isinstance(body, dict) else "no description"


def _hide_token_in_logs() -> None:
    pool = logging.getLogger("urllib3.connectionpool")
    if not any(isinstance(f, _HideToken) for f in pool.filters):
        pool.addFilter(_HideToken())
