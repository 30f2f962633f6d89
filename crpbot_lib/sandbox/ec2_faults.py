"""What goes wrong at EC2 on demand: errors by action and, for a launch, by instance type, zone and market."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crpbot_lib.sandbox.ec2_launch import service_model, zones, zones_offering
from crpbot_lib.sandbox.ec2_wire import Refusal

Market = Literal["spot", "on-demand"]

# What only a launch that would make a new instance can meet. A request whose token has its instance already gets that one, whatever
# the capacity has become; every other code comes before EC2 looks at what was asked.
OF_A_LAUNCH = frozenset(
    {
        "InstanceLimitExceeded",
        "InsufficientCapacity",
        "InsufficientHostCapacity",
        "InsufficientInstanceCapacity",
        "MaxSpotInstanceCountExceeded",
        "SpotMaxPriceTooLow",
        "Unsupported",
        "VcpuLimitExceeded",
    }
)
_MESSAGES = {
    "InsufficientInstanceCapacity": "There is not enough {type} capacity ({market}) in {zone} now.",
    "MaxSpotInstanceCountExceeded": "The limit of spot instances would be exceeded.",
    "VcpuLimitExceeded": "The vCPU limit of the bucket that {type} belongs to would be exceeded.",
    "UnauthorizedOperation": "You are not authorized to perform {action}.",
    "RequestLimitExceeded": "Request limit exceeded.",
    "InternalError": "An internal error has occurred.",
}


@cache
def _actions() -> frozenset[str]:
    return frozenset(service_model().operation_names)


class Call(NamedTuple):
    """One request. Only RunInstances has a type, a zone and a market."""

    action: str
    type: str = ""
    zone: str = ""
    market: str = ""


class Ec2Fault(BaseModel):
    """A rule: calls that match it get ``error``. What is None matches everything."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    error: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9.]*$")
    """A code of the EC2 API reference, "Error codes"; its HTTP status follows from it."""
    action: str | None = None
    type: str | None = None
    zone: str | None = None
    market: Market | None = None
    count: int | None = Field(default=None, ge=1)
    """How many calls are hit; None: all, until the rules are replaced."""
    after: bool = False
    """Carry the call out and answer with the error all the same: the answer that was lost."""

    @model_validator(mode="after")
    def _possible(self) -> Ec2Fault:
        if self.action is not None and self.action not in _actions():
            raise ValueError(f"EC2 has no action {self.action!r}; names are as in its API reference, as RunInstances")
        if self.action not in (None, "RunInstances") and (self.type, self.zone, self.market) != (None, None, None):
            raise ValueError(f"type, zone and market belong to RunInstances; {self.action} has none, so this would never hit")
        return self

    def hits(self, call: Call) -> bool:
        return all(
            mine in (None, theirs) for mine, theirs in zip((self.action, self.type, self.zone, self.market), call, strict=True)
        )

    @property
    def of_a_launch(self) -> bool:
        return self.error in OF_A_LAUNCH and not self.after

    def refusal(self, call: Call) -> Refusal:
        message = _MESSAGES.get(self.error, "{action}: refused by a rule of the local cloud.")
        return Refusal(self.error, message.format(**call._asdict()))


class _Active:
    def __init__(self, rule: Ec2Fault) -> None:
        self.rule, self.hits = rule, 0

    @property
    def spent(self) -> bool:
        return self.rule.count is not None and self.hits >= self.rule.count


class Ec2Faults:
    """The rules in force, the first that matches first, and how often they hit. Thread-safe."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._lock = threading.Lock()
        self._rules: list[_Active] = []
        self._capacity: list[_Active] = []
        self.unavailable: frozenset[str] = frozenset()
        """Instance types without capacity; ``unavailable_spot``: without spot capacity only."""
        self.unavailable_spot: frozenset[str] = frozenset()
        self.injected: Counter[str] = Counter()
        """By ``RunInstances:InsufficientInstanceCapacity`` and so on."""

    def set(self, rules: Sequence[Ec2Fault]) -> None:
        """Replaces the rules. ValueError names a type or zone that the region does not have; nothing changes then."""
        self._check({rule.type for rule in rules if rule.type}, {rule.zone for rule in rules if rule.zone})
        with self._lock:
            self._rules = [_Active(rule) for rule in rules]

    def set_capacity(self, unavailable: Collection[str], unavailable_spot: Collection[str]) -> None:
        """Replaces what has no capacity in any zone. ValueError names an unknown type; nothing changes then."""
        self._check({*unavailable, *unavailable_spot}, ())
        none = "InsufficientInstanceCapacity"
        rules = [Ec2Fault(error=none, type=kind) for kind in unavailable]
        rules += [Ec2Fault(error=none, type=kind, market="spot") for kind in unavailable_spot]
        with self._lock:
            self.unavailable, self.unavailable_spot = frozenset(unavailable), frozenset(unavailable_spot)
            self._capacity = [_Active(rule) for rule in rules]

    def _check(self, types: Collection[str], named_zones: Collection[str]) -> None:
        if unknown := sorted(kind for kind in types if not zones_offering(self._region, kind)):
            raise ValueError(f"{self._region} offers no instance type {', '.join(unknown)}")
        if unknown := sorted(set(named_zones) - set(zones(self._region))):
            raise ValueError(f"{self._region} has no zone {', '.join(unknown)}; it has {', '.join(zones(self._region))}")

    def find(self, call: Call, *, of_a_launch: bool, count: bool) -> Ec2Fault | None:
        """The rule that ``call`` meets now: one of a launch, or one of the others. ``count``: it hits, and not only would."""
        with self._lock:
            for active in (*self._rules, *self._capacity):
                if active.rule.of_a_launch == of_a_launch and not active.spent and active.rule.hits(call):
                    if count:
                        active.hits += 1
                        self.injected[f"{call.action}:{active.rule.error}"] += 1
                    return active.rule
            return None

    def describe(self) -> dict[str, Any]:
        with self._lock:
            return {
                "active": [one.rule.model_dump(exclude_defaults=True) for one in self._rules if not one.spent],
                "injected": dict(self.injected),
            }
