"""What a training job is told: typed, stored as ``training-runs/<run>/job.json``, and saved in every checkpoint.

Imports no torch: Airflow parses DAGs that import this.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    seed: int = 0

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
        return cls(layers=1, hidden=16, dropout=0.0, max_steps=30, batch_size=128)


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


class JobSpec(_Model):
    """One job: every symbol of it is trained on one instance, one after the other."""

    run: str
    feature_version: str
    symbols: tuple[str, ...] = Field(min_length=1)
    features: dict[str, FeatureFile]
    smoke: bool
    train: TrainConfig
    image: str
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
