"""What RunInstances may ask for, by botocore's model of the API and the offerings of each zone; moto takes anything.

A parameter or a value that EC2 does not know is refused as EC2 refuses it. One that EC2 knows and the local cloud does not imitate
is refused too: ignored in silence, it would seem to work.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import botocore.session
from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS

from crpbot_lib.sandbox.ec2_wire import Form, Refusal

DEFAULT_TYPE = "m1.small"
_USER_DATA_BYTES = 16384
_TAG_KEY_CHARACTERS, _TAG_VALUE_CHARACTERS = 128, 256
_TOKEN_CHARACTERS = 64

_IMITATED = frozenset(
    {
        "BlockDeviceMapping",
        "ClientToken",
        "DryRun",
        "IamInstanceProfile",
        "ImageId",
        "InstanceInitiatedShutdownBehavior",
        "InstanceMarketOptions.MarketType",
        "InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior",
        "InstanceMarketOptions.SpotOptions.MaxPrice",
        "InstanceMarketOptions.SpotOptions.SpotInstanceType",
        "InstanceType",
        "MaxCount",
        "MetadataOptions",
        "MinCount",
        "Monitoring",
        "NetworkInterface",
        "Placement.AvailabilityZone",
        "SecurityGroup",
        "SecurityGroupId",
        "SubnetId",
        "TagSpecification",
        "UserData",
    }
)
# of these EC2 takes more values than the local cloud imitates
_ONLY = {
    "InstanceMarketOptions.MarketType": "spot",
    "InstanceMarketOptions.SpotOptions.SpotInstanceType": "one-time",
    "InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior": "terminate",
    "MetadataOptions.HttpEndpoint": "enabled",
}


@cache
def service_model() -> Any:
    """botocore's model of the EC2 API."""
    return botocore.session.get_session().get_service_model("ec2")


@cache
def zones_offering(region: str, kind: str) -> tuple[str, ...]:
    """The zones of ``region`` that have instance type ``kind``, in order; none where either is unknown."""
    rows = INSTANCE_TYPE_OFFERINGS["availability-zone"].get(region, ())
    return tuple(sorted(row["Location"] for row in rows if row["InstanceType"] == kind))


@cache
def zones(region: str) -> tuple[str, ...]:
    """The zones of ``region``, in order."""
    return tuple(sorted({row["Location"] for row in INSTANCE_TYPE_OFFERINGS["availability-zone"].get(region, ())}))


def check(form: Form, region: str) -> Refusal | None:
    """Why EC2, or the local cloud, does not take this request; None when the parameters in themselves are right."""
    shape = service_model().operation_model("RunInstances").input_shape
    members = _members(shape)
    names = {name: wire for wire, (name, _) in members.items()}
    for name in (*shape.required_members, "ImageId"):
        if not form.get(names[name]):
            return Refusal("MissingParameter", f"The request must contain the parameter {name}")
    for key, value in form.items():
        if key not in ("Action", "Version") and (refusal := _check_one(shape, key, value)):
            return refusal
    if not 1 <= int(form["MinCount"]) <= int(form["MaxCount"]):
        return invalid("MinCount", form["MinCount"], f"it must be from 1 to MaxCount ({form['MaxCount']})")
    kind = form.get("InstanceType", DEFAULT_TYPE)
    if not zones_offering(region, kind):
        return Refusal("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType: {region} has no such type")
    if (zone := form.get("Placement.AvailabilityZone")) and zone not in zones(region):
        return Refusal("InvalidParameterValue", f"Invalid availability zone: [{zone}]")
    try:
        user_data = base64.b64decode(form.get("UserData", ""), validate=True)
    except binascii.Error:
        return Refusal("InvalidParameterValue", "Invalid BASE64 encoding of user data.")
    if len(user_data) > _USER_DATA_BYTES:
        return Refusal("InvalidParameterValue", f"User data has {len(user_data)} bytes, more than {_USER_DATA_BYTES}")
    return None


def _members(shape: Any) -> Mapping[str, tuple[str, Any]]:
    """A structure's members by their names on the wire (botocore's EC2Serializer)."""
    found = {}
    for name, member in shape.members.items():
        said = member.serialization
        wire = said.get("queryName") or (said["name"][0].upper() + said["name"][1:] if "name" in said else name)
        found[wire] = (name, member)
    return found


def _check_one(shape: Any, key: str, value: str) -> Refusal | None:
    path = []  # without the numbers of lists
    for part in key.split("."):
        if shape.type_name == "structure" and part in (members := _members(shape)):
            shape = members[part][1]
            path.append(part)
        elif shape.type_name == "list" and part.isdigit():
            shape = shape.member
        else:
            return Refusal("UnknownParameter", f"The parameter {key} is not recognized")
    if shape.type_name in ("structure", "list"):
        return Refusal("UnknownParameter", f"The parameter {key} is not recognized")
    name = ".".join(path)
    if not any(".".join(path[:depth]) in _IMITATED for depth in range(1, len(path) + 1)):
        return Refusal("UnsupportedOperation", f"the local cloud does not imitate {name} of RunInstances: leave it out")
    if shape.type_name == "integer" and not re.fullmatch(r"-?\d+", value):
        return invalid(key, value, "it must be an integer")
    if shape.type_name == "boolean" and value not in ("true", "false"):
        return invalid(key, value, "it must be true or false")
    if getattr(shape, "enum", None) and name != "InstanceType" and value not in shape.enum:
        return invalid(key, value, f"it must be one of {', '.join(shape.enum)}")
    if name in _ONLY and value != _ONLY[name]:
        return Refusal("UnsupportedOperation", f"the local cloud imitates {name}={_ONLY[name]} of RunInstances only, not {value}")
    if name == "InstanceMarketOptions.SpotOptions.MaxPrice" and not re.fullmatch(r"\d+(\.\d+)?", value):
        return invalid(key, value, "it must be an amount of USD an hour")
    limits = {
        "ClientToken": _TOKEN_CHARACTERS,
        "TagSpecification.Tag.Key": _TAG_KEY_CHARACTERS,
        "TagSpecification.Tag.Value": _TAG_VALUE_CHARACTERS,
    }
    if name in limits and len(value) > limits[name]:
        return invalid(key, value, f"it has {len(value)} characters, more than {limits[name]}")
    return None


def invalid(key: str, value: str, why: str) -> Refusal:
    """A value that parameter ``key`` cannot have."""
    return Refusal("InvalidParameterValue", f"Value ({value}) for parameter {key} is invalid: {why}")
