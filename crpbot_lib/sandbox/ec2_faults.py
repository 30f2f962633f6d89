"""What goes wrong at AWS on demand: EC2's errors by action and, for a launch, by instance type, zone and market; and connections
that are cut or say nothing, also those of S3."""

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
S3_ACTIONS = frozenset({"GetObject", "HeadObject", "ListObjectsV2", "PutObject"})

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
    return frozenset(service_model().operation_names) | S3_ACTIONS


class Call(NamedTuple):
    """One request. Only RunInstances has a type, a zone and a market."""

    action: str
    type: str = ""
    zone: str = ""
    market: str = ""


class Ec2Fault(BaseModel):
    """A rule: calls that match it get ``error``, or their connection is ``cut``, or stalls. What is None matches everything of EC2;
    S3's calls are hit by name alone. Exactly one of ``error``, ``cut`` and ``stall``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    error: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9.]*$")
    """A code of the EC2 API reference, "Error codes"; its HTTP status follows from it."""
    cut: Literal["reset", "headers", "body"] | None = None
    """Reset the connection without a word, or end it in the middle of the answer's headers or of its body."""
    stall: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Say nothing for so many seconds."""
    action: str | None = None
    type: str | None = None
    zone: str | None = None
    market: Market | None = None
    count: int | None = Field(default=None, ge=1)
    """How many calls are hit; None: all, until the rules are replaced."""
    after: bool = False
    """Carry the call out first: the answer that was lost. Without it an error and a reset come instead of the call, and a stalled
    call is carried out when its time is over, though its client may have gone."""

    @model_validator(mode="after")
    def _possible(self) -> Ec2Fault:
        if [self.error, self.cut, self.stall].count(None) != 2:
            raise ValueError("a rule needs exactly one of error, cut, stall")
        if self.after and self.cut in ("headers", "body"):
            raise ValueError(f"after: an answer that ends in its {self.cut} is always that of a call that was carried out")
        if self.error and self.action in S3_ACTIONS:
            raise ValueError(f"error codes are EC2's; {self.action} of S3 can be cut or stall")
        if self.action is not None and self.action not in _actions():
            raise ValueError(
                f"EC2 has no action {self.action!r}; names are as in its API reference, as RunInstances, or one of S3's: "
                f"{', '.join(sorted(S3_ACTIONS))}"
            )
        if self.action not in (None, "RunInstances") and (self.type, self.zone, self.market) != (None, None, None):
            raise ValueError(f"type, zone and market belong to RunInstances; {self.action} has none, so this would never hit")
        return self

    def hits(self, call: Call) -> bool:
        if self.action is None and call.action in S3_ACTIONS:
            return False
        return all(
            mine in (None, theirs) for mine, theirs in zip((self.action, self.type, self.zone, self.market), call, strict=True)
        )

    @property
    def of_a_launch(self) -> bool:
        return self.error in OF_A_LAUNCH and not self.after

    @property
    def name(self) -> str:
        """By which it is counted."""
        return self.error or (f"cut-{self.cut}" if self.cut else "stall")

    def refusal(self, call: Call) -> Refusal:
        assert self.error is not None
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
                        self.injected[f"{call.action}:{active.rule.name}"] += 1
                    return active.rule
            return None

    def describe(self) -> dict[str, Any]:
        with self._lock:
            return {
                "active": [one.rule.model_dump(exclude_defaults=True) for one in self._rules if not one.spent],
                "injected": dict(self.injected),
            }
