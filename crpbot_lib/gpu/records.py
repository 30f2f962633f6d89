"""The record of one launch: written before RunInstances, and all that the request is made of (termination.md, Identity)."""

from __future__ import annotations

import hashlib
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from crpbot_lib.gpu.instances import Instance
from crpbot_lib.lake import KeyMissingError, Lake, keys


class Offer(BaseModel):
    """An instance type in a subnet and a market (``spot`` or ``on-demand``). Prices in USD an hour."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instance_type: str
    subnet_id: str
    zone: str
    market: str
    price_usd_per_hour: float
    """In force in the zone when it was asked for."""
    max_usd_per_hour: float
    """The dearest that can be paid: the limit that a spot request states, or the on-demand price."""
    on_demand_usd_per_hour: float


class LaunchRecord(Offer):
    """What one launch was to be: an offer, taken for a run. Times are ISO 8601 UTC."""

    run: str
    sequence: int
    generation: int
    began_at: datetime
    """When the generation was begun; its UTC month is the ledger's."""
    nonce: str
    """Random, so that a run name used again in another lake or after a clean-up never meets an old token."""
    worst_usd: float
    """What the generation can come to: its dearest candidate until the deadline."""
    recorded_at: datetime
    deadline: datetime
    user_data_sha256: str
    dag: str
    dag_run: str
    remaining: tuple[Offer, ...]
    """What comes next if this one has no capacity."""

    @property
    def token(self) -> str:
        """The ClientToken (at most 64 characters): equal for every replay of this record, and for nothing else."""
        text = f"{self.nonce}\n{self.run}\n{self.generation}\n{self.instance_type}\n{self.subnet_id}\n{self.market}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def month(self) -> str:
        """The month of the ledger, as 2026-11."""
        return f"{self.began_at:%Y-%m}"


def records(lake: Lake, run: str) -> list[LaunchRecord]:
    """The launch records of a run, in the order in which they were written."""
    found = lake.keys(keys.training_run(run, "launches/"))
    return [LaunchRecord.model_validate(lake.read_json(key)) for key in found]


def record_of(lake: Lake, instance: Instance) -> LaunchRecord | None:
    """The record that the instance was launched by; None where the lake has none."""
    try:
        return LaunchRecord.model_validate(lake.read_json(keys.launch(instance.run, instance.sequence)))
    except KeyMissingError:
        return None
