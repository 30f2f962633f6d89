"""AWS on loopback: moto's server, behind a WSGI layer that is strict where moto is lax and lets instances be real.

What the layer adds to moto: ClientToken idempotency, capacity and price errors on demand, spot prices, ``resolve:ssm:`` images,
console output, and instance states that are the runner's truth instead of moto's immediate ``running`` and ``terminated``.
moto's backends are globals of the process; they are reset here, so that one process holds one such cloud at a time.
"""

from __future__ import annotations

import base64
import io
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from moto.backends import get_backend
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.ec2.models.instances import Instance as MotoInstance
from moto.ec2.models.instances import InstanceState, StateReason
from moto.moto_api._internal.models import moto_api_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.ssm.models import Parameter

from crpbot_lib.sandbox.instances import STATE_CODES, Instance, Launch, Runner

log = logging.getLogger(__name__)

EC2_NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15"
_ZONE_PREMIUM = {"a": 1.0, "b": 1.04, "c": 1.09}
"""Spot prices differ a little between zones; the nominal price is the cheapest zone's."""

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
Form = dict[str, str]


class Answer(NamedTuple):
    """A whole HTTP response."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes

    def send(self, start_response: StartResponse) -> Iterable[bytes]:
        start_response(self.status, self.headers)
        return [self.body]


def ec2_error(code: str, message: str, status: str = "400 Bad Request") -> Answer:
    """An error in EC2's wire format. ``status`` is 500 for the codes that EC2 calls server errors, such as missing capacity."""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error><Code>{escape(code)}</Code>'
        f"<Message>{escape(message)}</Message></Error></Errors><RequestID>{uuid.uuid4()}</RequestID></Response>"
    )
    return Answer(status, [("Content-Type", "text/xml;charset=UTF-8")], body.encode())


def _ec2_answer(action: str, inner: str) -> Answer:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{action}Response xmlns="{EC2_NAMESPACE}">'
        f"<requestId>{uuid.uuid4()}</requestId>{inner}</{action}Response>"
    )
    return Answer("200 OK", [("Content-Type", "text/xml;charset=UTF-8")], body.encode())


class Aws:
    """The WSGI application of the AWS endpoint. ``runner`` is set right after construction (it needs ``show_state``)."""

    runner: Runner

    def __init__(
        self,
        *,
        region: str,
        spot_prices: Mapping[str, float],
        bucket: str,
        log_groups: Sequence[str],
        instance_profiles: Sequence[str],
        image_parameters: Sequence[str],
    ) -> None:
        self.region = region
        self.spot_prices = dict(spot_prices)
        self.unavailable: set[str] = set()
        """Instance types without capacity; ``unavailable_spot``: without spot capacity only."""
        self.unavailable_spot: set[str] = set()
        # every EC2 call and every change of an instance's state is one after the other: moto's objects know no threads
        self._ec2_lock = threading.RLock()
        self._conditional_put_lock = threading.Lock()
        self._tokens: dict[str, tuple[Form, Answer]] = {}
        self._spot_price_since = datetime.now(UTC) - timedelta(hours=1)
        moto_api_backend.reset()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._ec2 = get_backend("ec2")[DEFAULT_ACCOUNT_ID][region]
        self._logs = get_backend("logs")[DEFAULT_ACCOUNT_ID][region]
        self._ssm = get_backend("ssm")[DEFAULT_ACCOUNT_ID][region]
        get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(bucket, region)
        for group in log_groups:
            self._logs.create_log_group(group, {})
        for profile in instance_profiles:
            get_backend("iam")[DEFAULT_ACCOUNT_ID]["aws"].create_instance_profile(profile, "/", [])
        if image_parameters:
            self._put_images(image_parameters)

    # --- WSGI ---

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if "/ec2/aws4_request" in environ.get("HTTP_AUTHORIZATION", ""):
            return self._handle_ec2(environ).send(start_response)
        if environ.get("REQUEST_METHOD") == "PUT" and environ.get("HTTP_IF_NONE_MATCH"):
            # moto looks first and writes later; S3 does both at once
            with self._conditional_put_lock:
                return self._ask_moto(environ).send(start_response)
        answer: Iterable[bytes] = self._moto(environ, start_response)
        return answer

    def _ask_moto(self, environ: Environ) -> Answer:
        seen: dict[str, Any] = {}

        def start_response(status: str, headers: list[tuple[str, str]], *_: object) -> None:
            seen.update(status=status, headers=headers)

        body = b"".join(self._moto(environ, start_response))
        return Answer(seen["status"], seen["headers"], body)

    def _ask_moto_ec2(self, environ: Environ, form: Form) -> Answer:
        data = urlencode(form).encode()
        return self._ask_moto({**environ, "wsgi.input": io.BytesIO(data), "CONTENT_LENGTH": str(len(data))})

    def _handle_ec2(self, environ: Environ) -> Answer:
        data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        form = dict(parse_qsl(data.decode(), keep_blank_values=True))
        action = form.get("Action", "")
        with self._ec2_lock:
            if action == "RunInstances" and form.get("DryRun") != "true":
                return self._run_instances(environ, form)
            if action == "DescribeSpotPriceHistory":
                return self._spot_price_history(form)
            if action == "GetConsoleOutput":
                return self._console_output(form)
            if action in ("StartInstances", "RebootInstances"):
                return ec2_error(
                    "UnsupportedOperation",
                    f"{action}: an instance of the local cloud runs its user data once; launch a new one",
                )
            return self._ask_moto_ec2(environ, form)

    # --- EC2 ---

    def _run_instances(self, environ: Environ, form: Form) -> Answer:
        token = form.get("ClientToken", "")
        asked = {k: v for k, v in form.items() if k != "ClientToken"}
        if token in self._tokens:
            before, answer = self._tokens[token]
            if before != asked:
                names = sorted(k for k in before.keys() | asked.keys() if before.get(k) != asked.get(k))
                return ec2_error(
                    "IdempotentParameterMismatch",
                    "The client token you have provided is associated with a resource with different parameters: "
                    + ", ".join(names),
                )
            return self._with_current_states(answer)
        refusal = self._refusal(form)
        if refusal:
            return refusal
        request = dict(form)
        if form.get("ImageId", "").startswith("resolve:ssm:"):
            name = form["ImageId"].removeprefix("resolve:ssm:")
            values = self._ssm.get_parameters([name])
            if not values:
                return ec2_error("InvalidParameterValue", f"The SSM parameter {name} could not be found in {self.region}")
            request["ImageId"] = values[name].value
        answer = self._ask_moto_ec2(environ, request)
        if not answer.status.startswith("200"):
            return answer
        for item in _instance_items(ElementTree.fromstring(answer.body)):
            self._start(_text(item, "instanceId"), form)
        answer = self._with_current_states(answer)
        if token:
            self._tokens[token] = (asked, answer)
        return answer

    def _refusal(self, form: Form) -> Answer | None:
        kind, spot = form.get("InstanceType", ""), form.get("InstanceMarketOptions.MarketType") == "spot"
        if kind in self.unavailable or (spot and kind in self.unavailable_spot):
            return ec2_error(
                "InsufficientInstanceCapacity",
                f"We currently do not have sufficient {kind} capacity in the Availability Zone you requested.",
                "500 Internal Server Error",
            )
        limit = form.get("InstanceMarketOptions.SpotOptions.MaxPrice")
        price = self.spot_prices.get(kind)
        if spot and limit and price is not None and float(limit) < price:
            return ec2_error(
                "SpotMaxPriceTooLow",
                f"Your Spot request price of {limit} is lower than the minimum required Spot request fulfillment price of {price}.",
            )
        return None

    def _start(self, instance_id: str, form: Form) -> None:
        moto_instance = self._ec2.get_instance(instance_id)
        spot = form.get("InstanceMarketOptions.MarketType") == "spot"
        kind = form.get("InstanceType", "m1.small")
        instance = self.runner.launch(
            Launch(
                id=instance_id,
                type=kind,
                image_id=moto_instance.image_id,
                user_data=base64.b64decode(form.get("UserData", "")),
                shutdown_behavior=form.get("InstanceInitiatedShutdownBehavior", "stop"),
                lifecycle="spot" if spot else "on-demand",
                spot_price=self.spot_prices.get(kind) if spot else None,
            )
        )

        def asked_to_end(end: Callable[[], None]) -> InstanceState:
            previous = InstanceState(moto_instance._state.name, moto_instance._state.code)
            end()
            return previous

        # moto's TerminateInstances and StopInstances call these, after they have checked the request
        hooks: Any = moto_instance
        hooks.terminate = lambda: asked_to_end(instance.terminate)
        hooks.stop = lambda: asked_to_end(instance.stop)
        self.show_state(instance)
        log.info("%s: %s %s launched", instance_id, kind, instance.launch.lifecycle)

    def show_state(self, instance: Instance) -> None:
        """Makes EC2 show the runner's truth. Called after every change of state, from any thread."""
        with self._ec2_lock:
            moto_instance = self._ec2.get_instance(instance.launch.id)
            # read under the lock: calls that overtook each other all show the newest state
            state = instance.state
            if state == "terminated" and moto_instance._state.name != "terminated":
                MotoInstance.terminate(moto_instance)  # releases its volumes and network interfaces
            moto_instance._state = InstanceState(state, STATE_CODES[state])
            moto_instance._reason = instance.reason
            code, message = instance.state_reason
            moto_instance.state_reason = StateReason(message, code)
        log.info("%s: %s%s", instance.launch.id, state, f" ({instance.reason})" if instance.reason else "")

    def _with_current_states(self, answer: Answer) -> Answer:
        ElementTree.register_namespace("", EC2_NAMESPACE)
        root = ElementTree.fromstring(answer.body)
        for item in _instance_items(root):
            instance = self.runner.get(_text(item, "instanceId"))
            shown = item.find(f"{{{EC2_NAMESPACE}}}instanceState")
            assert shown is not None
            for part, value in (("code", str(STATE_CODES[instance.state])), ("name", instance.state)):
                element = shown.find(f"{{{EC2_NAMESPACE}}}{part}")
                assert element is not None
                element.text = value
        body = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
        headers = [(k, v) for k, v in answer.headers if k.lower() != "content-length"]
        return Answer(answer.status, headers, body)

    def _spot_price_history(self, form: Form) -> Answer:
        def values(prefix: str) -> list[str]:
            return [v for k, v in sorted(form.items()) if k.startswith(f"{prefix}.")]

        wanted: dict[str, list[str]] = {
            "instance-type": values("InstanceType"),
            "product-description": values("ProductDescription"),
            "availability-zone": [form["AvailabilityZone"]] if "AvailabilityZone" in form else [],
        }
        for number in (k.split(".")[1] for k in form if k.startswith("Filter.") and k.endswith(".Name")):
            wanted[form[f"Filter.{number}.Name"]] = values(f"Filter.{number}.Value")
        items = []
        for kind, nominal in sorted(self.spot_prices.items()):
            for zone, premium in _ZONE_PREMIUM.items():
                row = {
                    "instance-type": kind,
                    "product-description": "Linux/UNIX",
                    "availability-zone": f"{self.region}{zone}",
                }
                if any(chosen and row.get(name) not in chosen for name, chosen in wanted.items()):
                    continue
                items.append(
                    f"<item><instanceType>{escape(kind)}</instanceType><productDescription>Linux/UNIX</productDescription>"
                    f"<spotPrice>{nominal * premium:.6f}</spotPrice>"
                    f"<timestamp>{self._spot_price_since:%Y-%m-%dT%H:%M:%S.000Z}</timestamp>"
                    f"<availabilityZone>{row['availability-zone']}</availabilityZone></item>"
                )
        return _ec2_answer("DescribeSpotPriceHistory", f"<spotPriceHistorySet>{''.join(items)}</spotPriceHistorySet>")

    def _console_output(self, form: Form) -> Answer:
        instance_id = form.get("InstanceId", "")
        try:
            text = self.runner.get(instance_id).console
        except KeyError:
            return ec2_error("InvalidInstanceID.NotFound", f"The instance ID '{instance_id}' does not exist")
        output = base64.b64encode(text.encode()[-65536:]).decode()
        return _ec2_answer(
            "GetConsoleOutput",
            f"<instanceId>{escape(instance_id)}</instanceId>"
            f"<timestamp>{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.000Z}</timestamp><output>{output}</output>",
        )

    def tags(self, instance_id: str) -> dict[str, str]:
        """The instance's tags as they are now."""
        with self._ec2_lock:
            return {tag["key"]: tag["value"] for tag in self._ec2.get_instance(instance_id).get_tags()}

    # --- CloudWatch Logs, SSM ---

    def put_log_events(self, group: str, stream: str, events: list[dict[str, Any]]) -> None:
        """Appends ``events`` ({"timestamp": ms, "message": text}); the stream is made where it is missing, the group is not (as
        docker's awslogs driver does): ValueError then."""
        if group not in self._logs.groups:
            raise ValueError(f"ResourceNotFoundException: The specified log group does not exist: {group}")
        if stream not in self._logs.groups[group].streams:
            self._logs.create_log_stream(group, stream)
        if events:
            self._logs.put_log_events(group, stream, events)

    def _put_images(self, parameters: Sequence[str]) -> None:
        """AWS's public parameters that name an image; put_parameter refuses names under /aws, as it should."""
        linux = [image for image in self._ec2.describe_images() if image.name and image.name.startswith("amzn")]
        image = sorted(linux, key=lambda i: str(i.name))[-1]
        parameter: Any = Parameter
        for name in parameters:
            self._ssm._parameters[name].append(
                parameter(
                    account_id=DEFAULT_ACCOUNT_ID,
                    name=name,
                    value=image.id,
                    parameter_type="String",
                    description="the local cloud's image",
                    allowed_pattern=None,
                    keyid=None,
                    last_modified_date=datetime.now(UTC),
                    version=1,
                    data_type="aws:ec2:image",
                )
            )


def _instance_items(root: ElementTree.Element) -> list[ElementTree.Element]:
    return root.findall(f"{{{EC2_NAMESPACE}}}instancesSet/{{{EC2_NAMESPACE}}}item")


def _text(item: ElementTree.Element, name: str) -> str:
    return item.findtext(f"{{{EC2_NAMESPACE}}}{name}") or ""
