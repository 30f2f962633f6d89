"""Typed settings and the symbol table: the one place where a default, a limit or a symbol is written down.

Settings come from environment variables (``CRPBOT_…``, nested with ``__``, e.g. ``CRPBOT_PROMOTION__ALLOW_SMOKE=true``) over
an optional TOML file named by ``CRPBOT_CONFIG``. A fourth symbol is a new entry of ``symbols``, not a code change.
"""

from __future__ import annotations

import os
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

Timeframe = Literal["1m", "5m", "15m", "1h"]
TIMEFRAMES: tuple[Timeframe, ...] = ("1m", "5m", "15m", "1h")
TIMEFRAME_SECONDS: dict[str, int] = {"1m": 60, "5m": 300, "15m": 900, "1h": 3600}

FeatureGroup = Literal["base", "multi_timeframe", "coingecko_hourly", "coingecko_daily"]
ALL_GROUPS: tuple[FeatureGroup, ...] = ("base", "multi_timeframe", "coingecko_hourly", "coingecko_daily")
WITHOUT_MULTI_TIMEFRAME: tuple[FeatureGroup, ...] = ("base", "coingecko_hourly", "coingecko_daily")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Symbol(_Model):
    """One traded symbol: its exchange product, its CoinGecko coin, the feature groups of its model."""

    name: str = Field(pattern=r"^[A-Z0-9]+-[A-Z]+$")
    coin: str
    coin_listed: date = Field(description="first day CoinGecko has of the coin; the all-time high needs the history from it")
    feature_groups: tuple[FeatureGroup, ...] = ALL_GROUPS
    exchange_listed: date | None = None
    """First UTC day of which the exchange can have a candle; an earlier day is refused. None: not checked."""
    all_time_highs: tuple[tuple[float, AwareDatetime], ...] = ()
    """Dated records (USD price, time) above what the daily prices show. Where CoinGecko's plan does not reach ``coin_listed``:
    every high that stood for 30 days or longer."""
    all_time_highs_until: date | None = None
    """UTC day before which none is lacking in ``all_time_highs``; None: the day of the last of them."""

    @property
    def highs_known_until(self) -> date | None:
        """UTC day before which ``all_time_highs`` says what the all-time high was; None where it says nothing."""
        days = [at.astimezone(UTC).date() for _, at in self.all_time_highs]
        return (self.all_time_highs_until or max(days)) if days else None

    @property
    def slug(self) -> str:
        """``BTC-USD`` as file names have it: ``BTC_USD``."""
        return self.name.replace("-", "_")


class GpuCandidate(_Model):
    """An instance type worth launching, with what is needed to judge its price."""

    instance_type: str
    gpu: str
    """A word of the GPU's name as CUDA tells it; the job refuses to train on another."""
    gpu_memory_gb: float | None = None
    """As it is sold, in 10^9 bytes; the job refuses a GPU with less than nine tenths of it. None: not checked."""
    on_demand_usd_per_hour: float
    subnet_ids: tuple[str, ...] = ()
    """Where it may be launched, each subnet in its own zone. None: the region's default subnets, one in each zone."""


class GpuSettings(_Model):
    region: str = "us-east-1"
    project_tag: str = "crpbot"
    owner_tag: str = "crpbot"
    candidates: tuple[GpuCandidate, ...] = (
        GpuCandidate(instance_type="g5.xlarge", gpu="A10G", gpu_memory_gb=24, on_demand_usd_per_hour=1.006),
        GpuCandidate(instance_type="g4dn.xlarge", gpu="T4", gpu_memory_gb=16, on_demand_usd_per_hour=0.526),
    )
    allow_on_demand: bool = False
    ami: str = "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-amazon-linux-2023/latest/ami-id"
    instance_profile: str = "crpbot-training"
    security_group_ids: tuple[str, ...] = ()
    volume_gib: int = 100
    training_image: str = "crpbot-training:0.1.0"
    log_group: str = "/crpbot/training"
    max_lifetime_minutes: int = Field(default=120, ge=1)
    boot_timeout_minutes: float = Field(default=15, gt=0)
    heartbeat_timeout_minutes: float = Field(default=10, gt=0)
    termination_timeout_seconds: float = Field(default=600, gt=0)
    visibility_grace_seconds: float = Field(default=10, ge=0)
    """How long a launched instance may stay invisible to DescribeInstances; absence is believed only after it."""
    poll_seconds: float = Field(default=5, gt=0)
    reap_seconds: float = Field(default=600, gt=0)
    """How often the reaper's DAG looks."""
    reap_grace_minutes: float = Field(default=5, ge=0)
    """The reaper leaves a younger instance alone until its deadline: its run's state may not be visible yet."""
    max_run_usd: float = Field(default=5, gt=0)
    """What all generations of one run may come to: what has ended at its price, what may still cost at its worst case."""
    max_month_usd: float = Field(default=50, gt=0)
    """The same of all runs begun in one UTC month, and of whatever else of the project is alive."""
    aws_conn_id: str | None = None
    """Airflow connection of the EC2 and logs calls. None: the AWS SDK's own chain (AWS_* variables, instance role), which the lake
    uses always."""


class FeatureSettings(_Model):
    min_row_share: float = Field(default=0.5, ge=0, le=1)
    """The gate refuses a file that has a row for fewer of its interval's minutes than this."""


class TrainingSettings(_Model):
    prefix: str = "models"
    days: int = Field(default=30, ge=1)
    """Days before the run's day that a scheduled retraining learns from."""
    smoke: bool = False
    """Marks the job as a smoke run: few steps, a small model, allowed without a GPU. Never a real model."""
    synthetic: bool = False
    """Whether the market data is generated: the run's report and plots then say SYNTHETIC."""
    fee_bps_per_order: float = Field(default=10.0, ge=0)
    """What the report's back-test pays for each order, in basis points of the price. Information only."""
    compare_features: bool = False
    """Whether each coin is trained on the 31 base features and on the 54 with CoinGecko, too, and the report shows them side by
    side. Triples the bill."""


class PromotionSettings(_Model):
    allow_smoke: bool = False
    """Whether a smoke model may be promoted (to the dry run). Only a demonstration sets it; live mode refuses it always."""
    allow_without_skill: bool = False
    """Whether a model may be promoted of which its test rows show no skill, or cannot tell. Of a smoke model ``allow_smoke``
    alone decides."""
    dry_run_iterations: int = Field(default=5, ge=1)


class RuntimeSettings(_Model):
    as_of: datetime | None = None
    """Decide as if it were this time (UTC) instead of the clock's; for replays and demonstrations. Refused by live mode."""
    window_minutes: int = Field(default=1500, ge=1)
    settle_seconds: float = Field(default=5, ge=0)
    """How long after a minute's close the exchange is given to serve its candle."""

    @field_validator("as_of")
    @classmethod
    def _utc(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"as_of={value.isoformat()} has no timezone; write it as 2025-05-29T00:00:00Z")
        return None if value is None else value.astimezone(UTC)


class TelegramSettings(_Model):
    url: str = "https://api.telegram.org"
    token: SecretStr | None = None
    chat_id: str | None = None


DEFAULT_SYMBOLS: tuple[Symbol, ...] = (
    Symbol(name="BTC-USD", coin="bitcoin", coin_listed=date(2013, 4, 28), exchange_listed=date(2014, 12, 1)),
    Symbol(
        name="ETH-USD",
        coin="ethereum",
        coin_listed=date(2015, 8, 7),
        exchange_listed=date(2016, 5, 18),
        feature_groups=WITHOUT_MULTI_TIMEFRAME,
    ),
    Symbol(name="SOL-USD", coin="solana", coin_listed=date(2020, 4, 11), exchange_listed=date(2021, 6, 17)),
)


PLAN_HISTORY_DAYS: dict[str, int | None] = {"pro": None, "demo": 365, "public": 365}
"""How far back each of CoinGecko's plans may be asked, None: without a limit. What else they allow: ``market_data/plans.py``."""


class OrchestrationSettings(_Model):
    """When the DAGs run, and what they do when a task fails for a reason that may pass."""

    schedules: bool = True
    """False: data and training DAGs run by hand or by event only. The reaper keeps its schedule always."""
    retries: int = Field(default=2, ge=0)
    retry_delay_seconds: float = Field(default=60, ge=0)
    coinbase_conn_id: str | None = None
    """Airflow Connection laid over the exchange's settings: host and schema, extra ``requests_per_second`` and ``page_size``."""
    coingecko_conn_id: str | None = None
    """As ``coinbase_conn_id``, for CoinGecko: the password is the key, extra has ``plan`` and ``requests_per_second``."""


class Settings(BaseSettings):
    """Everything that may differ between two deployments."""

    model_config = SettingsConfigDict(env_prefix="CRPBOT_", env_nested_delimiter="__", extra="ignore", frozen=True)

    lake: str = ""
    """``s3://bucket/prefix`` or ``file:///directory``."""
    coinbase_url: str = "https://api.coinbase.com"
    coinbase_page_size: int = Field(default=300, ge=1, le=350)
    """Candles a request; the documented 350 is refused for some accounts."""
    coinbase_requests_per_second: float = Field(default=10, gt=0)
    """Of one machine; Coinbase's public limit, which counts addresses."""
    coingecko_plan: Literal["pro", "demo", "public"] = "pro"
    """Host, header, rate and history follow from it (``market_data/plans.py``); pro is any paid plan."""
    coingecko_url: str | None = None
    """None: the plan's host."""
    coingecko_api_key: SecretStr | None = None
    coingecko_requests_per_second: float | None = Field(default=None, gt=0)
    """Of one machine; None: what the plan allows."""
    coingecko_history_days: int | None = Field(default=None, ge=1)
    """How far back the plan reaches, where that differs from ``coingecko_plan``: 730 for the smallest paid plan."""
    http_timeout_seconds: float = Field(default=30, gt=0)
    """How long a byte of an answer is waited for; a whole answer may take three times as long."""
    rate_limit_dir: str | None = None
    """Where the processes of one machine share their limits; None: a directory of this user's under the system's temporary one."""
    symbols: tuple[Symbol, ...] = DEFAULT_SYMBOLS
    gpu: GpuSettings = GpuSettings()
    features: FeatureSettings = FeatureSettings()
    training: TrainingSettings = TrainingSettings()
    promotion: PromotionSettings = PromotionSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    telegram: TelegramSettings = TelegramSettings()
    orchestration: OrchestrationSettings = OrchestrationSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  (the signature is pydantic-settings')
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = os.environ.get("CRPBOT_CONFIG")
        if path and not os.path.isfile(path):
            raise ValueError(f"CRPBOT_CONFIG={path!r} is no file: correct the path, or unset it to use the environment alone")
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        if not path:
            return sources
        file = TomlConfigSettingsSource(settings_cls, path)
        # the environment holds names of other programs, the file only ours
        if unknown := sorted(file.toml_data.keys() - settings_cls.model_fields.keys()):
            known = ", ".join(settings_cls.model_fields)
            raise ValueError(f"CRPBOT_CONFIG={path!r}: no setting is called {', '.join(unknown)}; there are {known}")
        return (*sources, file)

    @property
    def coingecko_reach_days(self) -> int | None:
        """How many days before now CoinGecko may be asked for; None: all of them."""
        return self.coingecko_history_days or PLAN_HISTORY_DAYS[self.coingecko_plan]

    def symbol(self, name: str) -> Symbol:
        """The table's entry of ``name``; ValueError names the known symbols."""
        for symbol in self.symbols:
            if symbol.name == name:
                return symbol
        known = ", ".join(s.name for s in self.symbols)
        raise ValueError(f"unknown symbol {name!r}: the configuration has {known}; add it to `symbols` (docs/configuration.md)")


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The process's settings, read once from the environment."""
    return Settings()
