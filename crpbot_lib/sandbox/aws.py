"""AWS on loopback: moto's server, behind a WSGI layer that is strict where moto is lax and lets instances be real.

What the layer adds to moto: parameters that are checked, ClientToken idempotency, errors on demand, spot prices, instances that are
invisible at first, ``resolve:ssm:`` images, console output, and instance states that are the runner's truth instead of moto's
immediate ``running`` and ``terminated``.
moto's backends are globals of the process; they are reset here, so that one process holds one such cloud at a time.
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlencode
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from moto.backends import get_backend
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.ec2.exceptions import InvalidSubnetIdError
from moto.ec2.models.instances import Instance as MotoInstance
from moto.ec2.models.instances import InstanceState, StateReason
from moto.moto_api._internal.models import moto_api_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.ssm.models import Parameter

from crpbot_lib.sandbox import ec2_launch
from crpbot_lib.sandbox.ec2_faults import Call, Ec2Fault, Ec2Faults
from crpbot_lib.sandbox.ec2_prices import SpotPrices
from crpbot_lib.sandbox.ec2_wire import NAMESPACE, Answer, Form, Refusal, StartResponse, answer, filters, listed
from crpbot_lib.sandbox.holds import Holds, Point
from crpbot_lib.sandbox.instances import STATE_CODES, Instance, Launch, Runner, State

log = logging.getLogger(__name__)

_REFUSED = {
    "StartInstances": "an instance of the local cloud runs its user data once; launch a new one",
    "RebootInstances": "an instance of the local cloud runs its user data once; launch a new one",
    # moto's would be instances that nothing runs on
    "CreateFleet": "the local cloud launches by RunInstances alone",
    "RequestSpotFleet": "the local cloud launches by RunInstances alone",
    "RequestSpotInstances": "the local cloud launches by RunInstances alone",
}

Environ = dict[str, Any]
_RUN_TAG = "crpbot:run"


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
        stopping: threading.Event,
        holds: Holds | None = None,
    ) -> None:
        self.region = region
        self._stopping = stopping
        self._holds = holds or Holds()
        self._user_agent = ""
        self.faults = Ec2Faults(region)
        self.invisible_seconds = 0.0
        """How long after its launch an instance is not to be seen, nor to be named in a request."""
        # every EC2 call and every change of an instance's state is one after the other: moto's objects know no threads
        self._ec2_lock = threading.RLock()
        self._conditional_put_lock = threading.Lock()
        self._tokens: dict[str, tuple[Form, Answer]] = {}
        self._prices = SpotPrices(region, spot_prices)
        moto_api_backend.reset()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._ec2 = get_backend("ec2")[DEFAULT_ACCOUNT_ID][region]
        self._logs = get_backend("logs")[DEFAULT_ACCOUNT_ID][region]
        self._ssm = get_backend("ssm")[DEFAULT_ACCOUNT_ID][region]
        self._iam = get_backend("iam")[DEFAULT_ACCOUNT_ID]["aws"]
        get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(bucket, region)
        for group in log_groups:
            self._logs.create_log_group(group, {})
        for profile in instance_profiles:
            self._iam.create_instance_profile(profile, "/", [])
        if image_parameters:
            self._put_images(image_parameters)

    # --- WSGI ---

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if "/ec2/aws4_request" in environ.get("HTTP_AUTHORIZATION", ""):
            return self._handle_ec2(environ).send(start_response)
        if (run := _published_run(environ)) and (error := self._holds.wait(run, "publish")):
            return _s3_error(error).send(start_response)
        action = _s3_action(environ)
        if action and (fault := self.faults.find(call := Call(action), of_a_launch=False, count=True)):
            return self._spoil(fault, call, environ, lambda: self._handle_s3(environ)).send(start_response)
        if action == "PutObject":
            return self._handle_s3(environ).send(start_response)
        answered: Iterable[bytes] = self._moto(environ, start_response)
        return answered

    def _handle_s3(self, environ: Environ) -> Answer:
        if environ["REQUEST_METHOD"] == "PUT" and environ.get("HTTP_IF_NONE_MATCH"):
            # moto looks first and writes later; S3 does both at once
            with self._conditional_put_lock:
                return self._ask_moto(environ)
        return self._ask_moto(environ)

    def _spoil(self, fault: Ec2Fault, call: Call, environ: Environ, carry_out: Callable[[], Answer]) -> Answer:
        """What the client gets of a call that ``fault`` hits. Holds no lock while it waits."""
        if fault.error:
            if fault.after:
                carry_out()
            return fault.refusal(call).answer()
        if fault.cut == "reset" and not fault.after:
            _cut(environ, None)
        answered = carry_out() if fault.cut or fault.after else None
        if fault.cut:
            assert answered is not None
            _cut(environ, None if fault.cut == "reset" else answered.begun(whole_head=fault.cut == "body"))
        if self._stopping.wait(fault.stall):
            _cut(environ, None)
        return answered or carry_out()

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
        for run, at in self._held_before(action, form):
            if error := self._holds.wait(run, at):
                return Refusal(error, f"{action}: refused by a hold of the local cloud.").answer()
        answered = self._answer_ec2(environ, action, form)
        if action == "RunInstances" and (error := self._holds.wait(_tagged_run(form), "launched")):
            return Refusal(error, f"{action}: carried out, and its answer lost by a hold of the local cloud.").answer()
        return answered

    def _held_before(self, action: str, form: Form) -> list[tuple[str, Point]]:
        """Where the runs that a call is about may be held before it is carried out."""
        if action == "DescribeInstances":
            return [(run, "look") for run in filters(form).get(f"tag:{_RUN_TAG}", [])]
        if action == "TerminateInstances":
            known = [i for i in self.runner.all() if i.launch.id in listed(form, "InstanceId")]
            return [(i.launch.run, "terminate") for i in known]
        return []

    def _answer_ec2(self, environ: Environ, action: str, form: Form) -> Answer:
        with self._ec2_lock:
            refusal = ec2_launch.check(form, self.region) if action == "RunInstances" else None
            if refusal:
                return refusal.answer()
            call = self._call(action, form)
            fault = self.faults.find(call, of_a_launch=False, count=True)
            if fault is None:
                return self._carry_out(environ, call, form)

        def carry_out() -> Answer:
            with self._ec2_lock:
                return self._carry_out(environ, call, form)

        return self._spoil(fault, call, environ, carry_out)

    # --- EC2 ---

    def _carry_out(self, environ: Environ, call: Call, form: Form) -> Answer:
        action, self._user_agent = call.action, environ.get("HTTP_USER_AGENT", "")
        if action in _REFUSED:
            return Refusal("UnsupportedOperation", f"{action}: {_REFUSED[action]}").answer()
        if action == "RunInstances":
            return self._run_instances(environ, call, form)
        if action == "DescribeSpotPriceHistory":
            return self._prices.answer(form)
        with self._visible_only():
            if action == "GetConsoleOutput":
                return self._console_output(form)
            answered = self._ask_moto_ec2(environ, form)
        # moto says shutting-down also of what has ended
        return self._with_states(answered, self._state) if action in ("TerminateInstances", "StopInstances") else answered

    @contextlib.contextmanager
    def _visible_only(self) -> Iterator[None]:
        """moto without the instances that EC2 does not show yet: absent from lists, and unknown by their id."""
        everything = self._ec2.reservations
        now = time.monotonic()
        hidden = {i.launch.id for i in self.runner.all() if now - i.launched < self.invisible_seconds}
        self._ec2.reservations = {
            name: reservation
            for name, reservation in everything.items()
            if not any(instance.id in hidden for instance in reservation.instances)
        }
        try:
            yield
        finally:
            self._ec2.reservations = everything

    def _call(self, action: str, form: Form) -> Call:
        """The request as the rules see it. Where it names neither subnet nor zone, EC2 takes a zone that can have the instance."""
        if action != "RunInstances":
            return Call(action)
        kind = form.get("InstanceType", ec2_launch.DEFAULT_TYPE)
        call = Call(action, kind, market=form.get("InstanceMarketOptions.MarketType") or "on-demand")
        if subnet := _subnet(form):
            with contextlib.suppress(InvalidSubnetIdError):
                call = call._replace(zone=self._ec2.get_subnet(subnet).availability_zone)
            return call
        if zone := form.get("Placement.AvailabilityZone"):
            return call._replace(zone=zone)
        anywhere = [call._replace(zone=zone) for zone in ec2_launch.zones_offering(self.region, kind)]
        return next((one for one in anywhere if not self._refusal(one, form, count=False)), anywhere[0])

    def _run_instances(self, environ: Environ, call: Call, form: Form) -> Answer:
        token = form.get("ClientToken", "")
        asked = {k: v for k, v in form.items() if k != "ClientToken"}
        if token in self._tokens:
            before, answered = self._tokens[token]
            if before != asked:
                names = sorted(k for k in before.keys() | asked.keys() if before.get(k) != asked.get(k))
                return Refusal(
                    "IdempotentParameterMismatch",
                    "The client token you have provided is associated with a resource with different parameters: "
                    + ", ".join(names),
                ).answer()
            ids = [_text(item, "instanceId") for item in _instance_items(ElementTree.fromstring(answered.body))]
            if all(self._state(name) == "terminated" for name in ids):
                message = f"The client token is that of a request whose instance has been terminated: {', '.join(ids)}"
                return Refusal("IdempotentInstanceTerminated", message).answer()
            return self._with_states(answered, self._state)
        request = dict(form)
        image = form["ImageId"]
        if image.startswith("resolve:ssm:"):
            name = image.removeprefix("resolve:ssm:")
            values = self._ssm.get_parameters([name])
            if not values:
                message = f"The SSM parameter {name} could not be found in {self.region}"
                return Refusal("InvalidParameterValue", message).answer()
            request["ImageId"] = values[name].value
        if refusal := self._missing(request):
            return refusal.answer()
        if form.get("DryRun") == "true":
            return self._ask_moto_ec2(environ, request)
        if refusal := self._refusal(call, form, count=True):
            return refusal.answer()
        if not _subnet(form):
            request["Placement.AvailabilityZone"] = call.zone
        request["MinCount"] = request["MaxCount"]  # there is capacity, and moto looks at the former only
        answered = self._ask_moto_ec2(environ, request)
        if not answered.succeeded:
            return answered
        # as EC2 answers: pending, however fast the boot is
        answered = self._with_states(answered, lambda _: "pending")
        if token:
            self._tokens[token] = (asked, answered)
        for item in _instance_items(ElementTree.fromstring(answered.body)):
            self._start(_text(item, "instanceId"), call, form)
        return answered

    def _missing(self, request: Form) -> Refusal | None:
        """What the request names and the account does not have, where moto does not look or has a code of its own."""
        image, profile = request["ImageId"], request.get("IamInstanceProfile.Name")
        if not re.fullmatch(r"ami-[0-9a-f]+", image):
            return Refusal("InvalidAMIID.Malformed", f'Invalid id: "{image}" (expecting "ami-...")')
        if image not in self._ec2.amis:
            return Refusal("InvalidAMIID.NotFound", f"The image id '[{image}]' does not exist")
        if profile and profile not in {one.name for one in self._iam.get_instance_profiles()}:
            return ec2_launch.invalid("IamInstanceProfile.Name", profile, "there is no such instance profile")
        if subnet := _subnet(request):
            try:
                self._ec2.get_subnet(subnet)
            except InvalidSubnetIdError as error:  # moto would leave an empty reservation behind
                return Refusal("InvalidSubnetID.NotFound", str(error.message))
        return None

    def _refusal(self, call: Call, form: Form, *, count: bool) -> Refusal | None:
        """Why the zone of ``call`` cannot have the instance now. ``count``: the rule that says so has hit."""
        offering = ec2_launch.zones_offering(self.region, call.type)
        if call.zone not in offering:
            return Refusal("Unsupported", f"{call.type} is not offered in {call.zone}, but in {', '.join(offering)}")
        if fault := self.faults.find(call, of_a_launch=True, count=count):
            return fault.refusal(call)
        limit = form.get("InstanceMarketOptions.SpotOptions.MaxPrice")
        price = self._prices.current(call.type, call.zone)
        if call.market == "spot" and limit and price is not None and float(limit) < price:
            return Refusal(
                "SpotMaxPriceTooLow",
                f"Your Spot request price of {limit} is lower than the minimum required Spot request fulfillment price of {price}.",
            )
        return None

    def _start(self, instance_id: str, call: Call, form: Form) -> None:
        moto_instance = self._ec2.get_instance(instance_id)
        spot = call.market == "spot"
        instance = self.runner.launch(
            Launch(
                id=instance_id,
                type=call.type,
                image_id=moto_instance.image_id,
                user_data=base64.b64decode(form.get("UserData", "")),
                shutdown_behavior=form.get("InstanceInitiatedShutdownBehavior", "stop"),
                lifecycle="spot" if spot else "on-demand",
                zone=call.zone,
                spot_price=self._prices.current(call.type, call.zone) if spot else None,
                run=_tagged_run(form),
            )
        )

        def asked_to_end(end: Callable[[], None]) -> InstanceState:
            previous = InstanceState(moto_instance._state.name, moto_instance._state.code)
            end()
            return previous

        # moto's TerminateInstances and StopInstances call these, after they have checked the request
        hooks: Any = moto_instance
        hooks.terminate = lambda: asked_to_end(lambda: instance.terminate(by=self._user_agent))
        hooks.stop = lambda: asked_to_end(lambda: instance.stop(by=self._user_agent))
        self.show_state(instance)
        log.info("%s: %s %s launched in %s", instance_id, call.type, instance.launch.lifecycle, call.zone)

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

    def _state(self, instance_id: str) -> State:
        return self.runner.get(instance_id).state

    def _with_states(self, answered: Answer, state_of: Callable[[str], State]) -> Answer:
        """The answer of RunInstances, TerminateInstances or StopInstances with these states in place of moto's."""
        if not answered.succeeded:
            return answered
        ElementTree.register_namespace("", NAMESPACE)
        root = ElementTree.fromstring(answered.body)
        for item in _instance_items(root):
            state = state_of(_text(item, "instanceId"))
            for part, value in (("code", str(STATE_CODES[state])), ("name", state)):
                for shown in ("instanceState", "currentState"):
                    if (element := item.find(f"{{{NAMESPACE}}}{shown}/{{{NAMESPACE}}}{part}")) is not None:
                        element.text = value
        body = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
        headers = [(k, v) for k, v in answered.headers if k.lower() != "content-length"]
        return Answer(answered.status, headers, body)

    def _console_output(self, form: Form) -> Answer:
        instance_id = form.get("InstanceId", "")
        if self._ec2.get_instance_by_id(instance_id) is None:
            return Refusal("InvalidInstanceID.NotFound", f"The instance ID '{instance_id}' does not exist").answer()
        output = base64.b64encode(self.runner.get(instance_id).console.encode()[-65536:]).decode()
        return answer(
            "GetConsoleOutput",
            f"<instanceId>{escape(instance_id)}</instanceId>"
            f"<timestamp>{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.000Z}</timestamp><output>{output}</output>",
        )

    def set_spot_prices(self, prices: Mapping[str, Mapping[str, float]]) -> None:
        """From now on ``prices[type][zone]``, USD an hour; ValueError names a type or zone that there is not."""
        with self._ec2_lock:
            self._prices.set(prices)

    def describe(self) -> dict[str, Any]:
        """What EC2 charges, lacks and refuses now, in JSON."""
        with self._ec2_lock:
            return {
                "spot_prices": self._prices.describe(),
                "unavailable": sorted(self.faults.unavailable),
                "unavailable_spot": sorted(self.faults.unavailable_spot),
                "faults": self.faults.describe(),
                "invisible_seconds": self.invisible_seconds,
            }

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


def _s3_action(environ: Environ) -> str | None:
    """Which of ``ec2_faults.S3_ACTIONS`` a request asks for, its bucket being in its path; None: another one, or not of S3."""
    if "/s3/aws4_request" not in environ.get("HTTP_AUTHORIZATION", ""):
        return None
    method, query = environ["REQUEST_METHOD"], dict(parse_qsl(environ["QUERY_STRING"], keep_blank_values=True))
    if environ["PATH_INFO"].strip("/").partition("/")[2]:
        return {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject"}.get(method) if not query else None
    return "ListObjectsV2" if method == "GET" and query.get("list-type") == "2" else None


def _cut(environ: Environ, data: bytes | None) -> NoReturn:
    """Ends the client's connection after ``data``, or resets it without a word. To the server it is a client that has left."""
    connection: socket.socket = environ["werkzeug.socket"]
    if data is None:
        # closed with a linger of no time, a connection is reset (socket(7), SO_LINGER)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(connection.detach())
    else:
        connection.sendall(data)
    raise ConnectionResetError("cut by a rule of the local cloud")


def _instance_items(root: ElementTree.Element) -> list[ElementTree.Element]:
    return root.findall(f"{{{NAMESPACE}}}instancesSet/{{{NAMESPACE}}}item")


def _text(item: ElementTree.Element, name: str) -> str:
    return item.findtext(f"{{{NAMESPACE}}}{name}") or ""


def _tagged_run(form: Form) -> str:
    """The run that RunInstances tags its instances with; empty where it tags none."""
    prefixes = [key.removesuffix("Key") for key, value in form.items() if key.endswith(".Key") and value == _RUN_TAG]
    return form.get(f"{prefixes[0]}Value", "") if prefixes else ""


def _published_run(environ: Environ) -> str:
    """The run whose model S3 is to store as a published one: published models carry it as an object tag."""
    if environ.get("REQUEST_METHOD") != "PUT" or "/models/" not in environ.get("PATH_INFO", ""):
        return ""
    tags: dict[str, str] = dict(parse_qsl(environ.get("HTTP_X_AMZ_TAGGING", "")))
    return tags.get("run", "")


def _s3_error(code: str) -> Answer:
    message = "refused by a hold of the local cloud"
    body = f"<Error><Code>{escape(code)}</Code><Message>{message}</Message></Error>"
    return Answer("403 Forbidden", [("Content-Type", "application/xml")], body.encode())


def _subnet(form: Form) -> str | None:
    return form.get("SubnetId") or form.get("NetworkInterface.1.SubnetId")
