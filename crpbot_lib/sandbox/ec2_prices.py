"""Spot prices by instance type and zone, each with its history, and DescribeSpotPriceHistory over them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import NamedTuple
from xml.sax.saxutils import escape

from crpbot_lib.sandbox.ec2_launch import zones_offering
from crpbot_lib.sandbox.ec2_wire import Answer, Form, Refusal, answer, filters, listed

_ZONE_PREMIUM = 0.04
"""Spot prices differ a little between zones: a nominal price is the first zone's, and each zone after it has this share more."""
_KNOWN_FOR = timedelta(hours=1)
"""How long before the local cloud's start its first prices have been in force."""
_PRODUCT = "Linux/UNIX"
_PAGE = 1000


class _Price(NamedTuple):
    at: datetime
    usd: float


class SpotPrices:
    """USD an hour. Not thread-safe: the caller holds a lock."""

    def __init__(self, region: str, nominal: Mapping[str, float]) -> None:
        self._region = region
        self._history: dict[tuple[str, str], list[_Price]] = {}
        first = {
            kind: {zone: round(usd * (1 + _ZONE_PREMIUM * place), 6) for place, zone in enumerate(self._zones(kind))}
            for kind, usd in nominal.items()
        }
        self._set(first, datetime.now(UTC) - _KNOWN_FOR)

    def set(self, prices: Mapping[str, Mapping[str, float]]) -> None:
        """From now on ``prices[type][zone]``; all others stay. ValueError names an unknown type or zone; nothing changes then."""
        for kind, by_zone in prices.items():
            if unknown := sorted(set(by_zone) - set(self._zones(kind))):
                raise ValueError(f"{kind} is not offered in {', '.join(unknown)}, but in {', '.join(self._zones(kind))}")
        self._set(prices, datetime.now(UTC))

    def _zones(self, kind: str) -> tuple[str, ...]:
        if found := zones_offering(self._region, kind):
            return found
        raise ValueError(f"{self._region} offers no instance type {kind}")

    def _set(self, prices: Mapping[str, Mapping[str, float]], at: datetime) -> None:
        for kind, by_zone in prices.items():
            for zone, usd in by_zone.items():
                self._history.setdefault((kind, zone), []).append(_Price(at, usd))

    def current(self, kind: str, zone: str) -> float | None:
        """None where there is no price."""
        history = self._history.get((kind, zone))
        return history[-1].usd if history else None

    def describe(self) -> dict[str, dict[str, float]]:
        """The prices in force, by type and zone."""
        found: dict[str, dict[str, float]] = {}
        for (kind, zone), history in self._history.items():
            found.setdefault(kind, {})[zone] = history[-1].usd
        return found

    def answer(self, form: Form) -> Answer:
        """DescribeSpotPriceHistory: per type and zone the price in force at StartTime and the changes since, up to EndTime, newest
        first (EC2 API reference)."""
        wanted = {
            "instance-type": listed(form, "InstanceType"),
            "product-description": listed(form, "ProductDescription"),
            "availability-zone": [form["AvailabilityZone"]] if "AvailabilityZone" in form else [],
        }
        conditions = [(name, values) for name, values in (*wanted.items(), *filters(form).items()) if values]
        if unknown := sorted({name for name, _ in conditions} - set(wanted)):
            return Refusal("InvalidParameterValue", f"The filter '{unknown[0]}' is invalid").answer()
        try:
            start, end = (datetime.fromisoformat(form[name]) if name in form else None for name in ("StartTime", "EndTime"))
            first, size = int(form.get("NextToken") or 0), int(form.get("MaxResults") or _PAGE)
        except ValueError as error:
            return Refusal("InvalidParameterValue", str(error)).answer()
        found = []
        for (kind, zone), history in self._history.items():
            row = {"instance-type": kind, "product-description": _PRODUCT, "availability-zone": zone}
            if all(any(fnmatchcase(row[name], value) for value in values) for name, values in conditions):
                found += [(price, kind, zone) for price in _between(history, start, end)]
        found.sort(key=lambda one: one[0].at, reverse=True)
        page = found[first : first + size]
        items = "".join(
            f"<item><instanceType>{escape(kind)}</instanceType><productDescription>{_PRODUCT}</productDescription>"
            f"<spotPrice>{price.usd:.6f}</spotPrice><timestamp>{price.at.isoformat(timespec='milliseconds')[:-6]}Z</timestamp>"
            f"<availabilityZone>{zone}</availabilityZone></item>"
            for price, kind, zone in page
        )
        following = str(first + size) if first + size < len(found) else ""
        return answer(
            "DescribeSpotPriceHistory",
            f"<spotPriceHistorySet>{items}</spotPriceHistorySet><nextToken>{following}</nextToken>",
        )


def _between(history: list[_Price], start: datetime | None, end: datetime | None) -> list[_Price]:
    known = [price for price in history if end is None or price.at <= end]
    if start is None:
        return known
    before = [price for price in known if price.at <= start]
    return before[-1:] + known[len(before) :]
