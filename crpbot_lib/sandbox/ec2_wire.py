"""EC2's wire format: the form of a request, the XML of an answer, and which HTTP status an error code has."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15"

StartResponse = Callable[..., Any]
Form = dict[str, str]
"""A request's parameters under their names on the wire, as ``TagSpecification.1.Tag.2.Key``."""

# EC2 API reference, "Error codes": server errors are 500, or 503 where the client is to slow down; a code not named here is 400
_STATUSES = {
    "AuthFailure": HTTPStatus.UNAUTHORIZED,
    "UnauthorizedOperation": HTTPStatus.FORBIDDEN,
    "BandwidthLimitExceeded": HTTPStatus.SERVICE_UNAVAILABLE,
    "RequestLimitExceeded": HTTPStatus.SERVICE_UNAVAILABLE,
    "ServiceUnavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "Unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "InsufficientAddressCapacity": HTTPStatus.INTERNAL_SERVER_ERROR,
    "InsufficientCapacity": HTTPStatus.INTERNAL_SERVER_ERROR,
    "InsufficientHostCapacity": HTTPStatus.INTERNAL_SERVER_ERROR,
    "InsufficientInstanceCapacity": HTTPStatus.INTERNAL_SERVER_ERROR,
    "InsufficientVolumeCapacity": HTTPStatus.INTERNAL_SERVER_ERROR,
    "InternalError": HTTPStatus.INTERNAL_SERVER_ERROR,
    "InternalFailure": HTTPStatus.INTERNAL_SERVER_ERROR,
}


class Answer(NamedTuple):
    """A whole HTTP response."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def succeeded(self) -> bool:
        return self.status.startswith("200")

    def begun(self, *, whole_head: bool) -> bytes:
        """What is on the wire when the connection ends too early: half of the body, whose whole length is announced, or half of the
        head."""
        headers = {name.lower(): value for name, value in self.headers} | {"content-length": str(len(self.body))}
        lines = [f"HTTP/1.1 {self.status}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        head = "\r\n".join(lines).encode("latin-1")
        return head + self.body[: len(self.body) // 2] if whole_head else head[: len(head) // 2]

    def send(self, start_response: StartResponse) -> Iterable[bytes]:
        start_response(self.status, self.headers)
        return [self.body]


class Refusal(NamedTuple):
    """Why EC2 does not do what was asked: an error code of the EC2 API reference and a message."""

    code: str
    message: str

    def answer(self) -> Answer:
        status = _STATUSES.get(self.code, HTTPStatus.BAD_REQUEST)
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error><Code>{escape(self.code)}</Code>'
            f"<Message>{escape(self.message)}</Message></Error></Errors><RequestID>{uuid.uuid4()}</RequestID></Response>"
        )
        return Answer(f"{status.value} {status.phrase}", [("Content-Type", "text/xml;charset=UTF-8")], body.encode())


def answer(action: str, inner: str) -> Answer:
    """The answer of ``action`` with ``inner`` as its elements."""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{action}Response xmlns="{NAMESPACE}">'
        f"<requestId>{uuid.uuid4()}</requestId>{inner}</{action}Response>"
    )
    return Answer("200 OK", [("Content-Type", "text/xml;charset=UTF-8")], body.encode())


def listed(form: Form, name: str) -> list[str]:
    """The values of a flattened list parameter, in order: ``InstanceId`` of ``InstanceId.1``, ``InstanceId.2``, …."""
    numbered = {key.removeprefix(f"{name}."): value for key, value in form.items() if key.startswith(f"{name}.")}
    return [numbered[number] for number in sorted((n for n in numbered if n.isdigit()), key=int)]


def filters(form: Form) -> dict[str, list[str]]:
    """The values of each ``Filter.N``, by its name."""
    numbers = [key.split(".")[1] for key in form if key.startswith("Filter.") and key.endswith(".Name")]
    return {form[f"Filter.{number}.Name"]: listed(form, f"Filter.{number}.Value") for number in numbers}
