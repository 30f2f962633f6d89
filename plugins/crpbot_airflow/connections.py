"""Airflow Connections laid over the settings of the two sources, for deployments that keep hosts, keys and rates there.

``orchestration.coinbase_conn_id`` and ``orchestration.coingecko_conn_id`` name them; without them Airflow is asked for nothing.
What a Connection says counts: ``host`` (with ``schema`` as its scheme, https unless it says otherwise, and ``port``) is the
source's address, ``password`` CoinGecko's key; the extra has ``requests_per_second``, Coinbase's ``page_size``, CoinGecko's
``plan``.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from crpbot_lib.config import Settings

SOURCES = {"coinbase": ("requests_per_second", "page_size"), "coingecko": ("requests_per_second", "plan")}
"""Source, and what the extra of its Connection may hold."""


def with_connections(current: Settings) -> Settings:
    """``current`` with the configured Connections laid over it; ValueError names a Connection that is not there, or what is wrong
    with it, and never a value of it."""
    found: dict[str, Any] = {}
    for source, extras in SOURCES.items():
        name = getattr(current.orchestration, f"{source}_conn_id")
        if name:
            found |= _of(source, name, extras)
    if not found:
        return current
    values = {field: getattr(current, field) for field in Settings.model_fields} | found
    try:
        return Settings(**values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        # not chained: pydantic's error shows the values
        raise ValueError(f"the Airflow Connections of the market data make settings that are not valid: {wrong}") from None


def _of(source: str, name: str, extras: tuple[str, ...]) -> dict[str, Any]:
    from airflow.sdk import Connection
    from airflow.sdk.exceptions import AirflowNotFoundException

    setting = f"CRPBOT_ORCHESTRATION__{source.upper()}_CONN_ID"
    try:
        connection = Connection.get(name)
    except AirflowNotFoundException:
        raise ValueError(f"{setting}={name!r}: Airflow has no such Connection; add it, or unset the setting") from None
    found: dict[str, Any] = {}
    if connection.host:
        found[f"{source}_url"] = _url(connection)
    if source == "coingecko" and connection.password:
        found["coingecko_api_key"] = connection.password
    extra = connection.extra_dejson
    if unknown := sorted(extra.keys() - set(extras)):
        raise ValueError(f"the extra of the Connection {name!r} has {', '.join(unknown)}; it may have {', '.join(extras)}")
    return found | {f"{source}_{key}": value for key, value in extra.items()}


def _url(connection: Any) -> str:
    host: str = connection.host
    if "://" in host:
        return host
    port = f":{connection.port}" if connection.port else ""
    address, slash, path = host.partition("/")
    return f"{connection.schema or 'https'}://{address}{port}{slash}{path}"
