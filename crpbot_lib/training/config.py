"""What a training job is told: typed, stored as ``training-runs/<run>/job.json``, and saved in every checkpoint.

Imports no torch: Airflow parses DAGs that import this.
"""

from __future__ import annotations

import re
from math import sqrt

from pydantic import BaseModel, ConfigDict, Field, model_validator

LEARNING_RATE_BATCH = 1024
"""The batch that ``TrainConfig.learning_rate`` is meant for."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainConfig(_Model):
    """Model and training parameters. The defaults are the team's (mission.md)."""

    sequence: int = Field(default=60, ge=1)
    """Rows (minutes) of one window."""
    horizon: int = Field(default=15, ge=1)
    """Minutes between the decision and the price that it is judged by."""
    layers: int = Field(default=3, ge=1)
    hidden: int = Field(default=128, ge=1)
    bidirectional: bool = True
    dropout: float = Field(default=0.35, ge=0, lt=1)
    epochs: int = Field(default=15, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Ends the training after so many optimiser steps, whatever ``epochs`` says; smoke runs set it."""
    batch_size: int = Field(default=1024, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    """At a batch of ``LEARNING_RATE_BATCH``; see ``scaled_learning_rate``."""
    weight_decay: float = Field(default=1e-4, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    validation_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Share of the rows, after the training's and before the test's: for choices and calibration."""
    test_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Share of the rows, the latest ones: for the final judgement only."""
    embargo: int = Field(default=60, ge=0)
    """Minutes after each of the two borders of which no window of the later side may hold a row."""
    scaler_clip: float = Field(default=10.0, gt=0)
    """Scaled values are cut at +-this: a level never seen in training (a new high) must not saturate the network."""
    window_stride: int = Field(default=5, ge=1)
    """Each epoch takes every so many-th window, from an offset drawn anew: windows of neighbouring minutes are nearly the same."""
    mixed_precision: bool = True
    """On a GPU the LSTM computes in float16 with the loss scaled; weights and optimiser stay float32. A CPU computes in float32."""
    seed: int = 0

    @property
    def scaled_learning_rate(self) -> float:
        """What the optimiser takes: with Adam's the root of the batch's growth, not the growth itself (Malladi et al., "On the SDEs
        and Scaling Rules for Adaptive Gradient Algorithms", 2022)."""
        return self.learning_rate * sqrt(self.batch_size / LEARNING_RATE_BATCH)

    @model_validator(mode="after")
    def _rows_to_train_on(self) -> TrainConfig:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} leave no rows to train on"
            )
        return self

    @classmethod
    def for_smoke(cls) -> TrainConfig:
        """Seconds on a CPU: it proves that the path works, never that the model does."""
        return cls(layers=1, hidden=16, dropout=0.0, max_steps=30, batch_size=128, learning_rate=3e-3, window_stride=1)


class FeatureFile(_Model):
    """What the features manifest promises of one symbol's file; the job compares the file with it before it trains."""

    key: str
    sha256: str
    rows: int
    features: int
    names: tuple[str, ...]
    catalog: str
    """Hash of the symbol's part of the feature catalog."""

    @model_validator(mode="after")
    def _count(self) -> FeatureFile:
        if len(self.names) != self.features:
            raise ValueError(f"{self.key}: the manifest says {self.features} features and lists {len(self.names)} names")
        return self


class Gpu(_Model):
    """A GPU that the job may find itself on; see ``GpuCandidate`` for the fields."""

    instance_type: str
    name: str
    memory_gb: float | None = None

    def matches(self, name: str, memory_bytes: int) -> bool:
        """Whether a device with this name (CUDA's, like ``Tesla T4``) and this much memory is such a GPU. The driver keeps some."""
        known = re.search(rf"\b{re.escape(self.name)}\b", name, re.IGNORECASE) is not None
        return known and (self.memory_gb is None or memory_bytes >= 0.9e9 * self.memory_gb)

    def __str__(self) -> str:
        memory = "" if self.memory_gb is None else f" with {self.memory_gb:g} GB"
        return f"{self.name}{memory} ({self.instance_type})"


class JobSpec(_Model):
    """One job: every symbol of it is trained on one instance, one after the other."""

    run: str
    feature_version: str
    symbols: tuple[str, ...] = Field(min_length=1)
    features: dict[str, FeatureFile]
    smoke: bool
    train: TrainConfig
    image: str
    gpus: tuple[Gpu, ...] = ()
    """One of these the machine must have, unless it is a smoke run; none: any."""
    synthetic: bool = False
    """Whether the market data is generated; what is shown of the models then says so."""
    fee_bps_per_order: float = Field(default=10.0, ge=0)
    """Of the report's back-test, in basis points of the price."""
    compare_features: bool = False
    """Whether each coin is trained on fewer features too, to compare: up to three trainings a coin."""

    @model_validator(mode="after")
    def _complete(self) -> JobSpec:
        if missing := [s for s in self.symbols if s not in self.features]:
            raise ValueError(f"run {self.run}: no features file is named for {', '.join(missing)}")
        return self
