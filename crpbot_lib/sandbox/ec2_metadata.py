"""The instance-metadata service, version 2: a token first, then what the instance may know of itself and of its end.

One path of the control server an instance. Its processes find it under AWS_EC2_METADATA_SERVICE_ENDPOINT, as AWS's SDKs name it.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import datetime

from werkzeug.wrappers import Request, Response

from crpbot_lib.sandbox.instances import Instance

_MOST_SECONDS = 21600
_TTL = "X-aws-ec2-metadata-token-ttl-seconds"
_TOKEN = "X-aws-ec2-metadata-token"


class MetadataService:
    """Answers every instance's requests below ``/latest/``. A token is good for the instance that it was given to."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, str], float] = {}  # when each ends, on the monotonic clock

    def answer(self, instance: Instance, request: Request, path: str) -> Response:
        """401 without a living token, 404 for what there is not, such as a notice where nothing is announced (EC2 user guide)."""
        if (request.method == "PUT") != (path == "api/token"):
            return _text("Method Not Allowed", 405)
        if request.method == "PUT":
            return self._put_token(instance, request)
        until = self._tokens.get((instance.launch.id, request.headers.get(_TOKEN, "")))
        if until is None or until <= time.monotonic():
            return _text("Unauthorized", 401)
        value = _values(instance).get(path.removesuffix("/"))
        return _text("Not Found", 404) if value is None else _text(value)

    def _put_token(self, instance: Instance, request: Request) -> Response:
        if "X-Forwarded-For" in request.headers:
            return _text("Forbidden", 403)  # it came through a proxy
        seconds = request.headers.get(_TTL, "")
        if not seconds.isdecimal() or not 1 <= int(seconds) <= _MOST_SECONDS:
            return _text("Bad Request", 400)
        token = secrets.token_urlsafe(40)
        self._tokens[instance.launch.id, token] = time.monotonic() + int(seconds)
        response = _text(token)
        response.headers[_TTL] = seconds
        return response


def _values(instance: Instance) -> dict[str, str]:
    launch = instance.launch
    values = {
        "meta-data/ami-id": launch.image_id,
        "meta-data/instance-id": launch.id,
        "meta-data/instance-life-cycle": launch.lifecycle,
        "meta-data/instance-type": launch.type,
        "meta-data/placement/availability-zone": launch.zone,
    }
    if instance.ends_at is not None:
        values["meta-data/spot/instance-action"] = json.dumps({"action": "terminate", "time": _time(instance.ends_at)})
        values["meta-data/spot/termination-time"] = _time(instance.ends_at)
    if instance.rebalance_at is not None:
        values["meta-data/events/recommendations/rebalance"] = json.dumps({"noticeTime": _time(instance.rebalance_at)})
    return values


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%SZ}"


def _text(body: str, status: int = 200) -> Response:
    return Response(body, status, content_type="text/plain")
