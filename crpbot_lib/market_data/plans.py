"""What CoinGecko's plans allow: the one place for their hosts, headers and limits. Sources and dates: docs/market_data.md."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from crpbot_lib.config import PLAN_HISTORY_DAYS


@dataclass(frozen=True)
class Plan:
    """One way to be known to CoinGecko. ``history`` is how far back from now it may be asked, None without a limit."""

    name: str
    url: str
    header: str | None
    """Of the key; None where there is none."""
    requests_per_minute: int
    history: timedelta | None

    @property
    def requests_per_second(self) -> float:
        """One a minute fewer than allowed: a minute that begins with one request and ends with another counts both."""
        return (self.requests_per_minute - 1) / 60


def reaching(days: int | None) -> timedelta | None:
    """A plan's ``history`` of so many days."""
    return None if days is None else timedelta(days=days)


PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        # the smallest paid plan's rate: no paid plan refuses it
        Plan("pro", "https://pro-api.coingecko.com/api/v3", "x-cg-pro-api-key", 250, reaching(PLAN_HISTORY_DAYS["pro"])),
        Plan("demo", "https://api.coingecko.com/api/v3", "x-cg-demo-api-key", 30, reaching(PLAN_HISTORY_DAYS["demo"])),
        # documented as 5 to 15, by the load of the world
        Plan("public", "https://api.coingecko.com/api/v3", None, 5, reaching(PLAN_HISTORY_DAYS["public"])),
    )
}
