"""A trained model as one file: a plain dict that ``torch.load(path, map_location="cpu", weights_only=True)`` opens.

It carries all that is needed to predict and to judge whether it may: input_size, the ordered feature names, the catalog hash,
the scaler, the architecture, the weights, and whether it is a smoke model.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from crpbot_lib.training.config import TrainConfig
from crpbot_lib.training.dataset import Floats, Scaler
from crpbot_lib.training.model import PriceLSTM

FORMAT = 1


class CheckpointError(Exception):
    """The file is no checkpoint of this format, or contradicts itself; the message says in what."""


@dataclass(frozen=True)
class Checkpoint:
    """One symbol's trained model. ``names`` are the features in the order of the network's inputs."""

    symbol: str
    run: str
    smoke: bool
    names: tuple[str, ...]
    catalog: str
    feature_version: str
    scaler: Scaler
    config: TrainConfig
    weights: dict[str, torch.Tensor]

    @property
    def input_size(self) -> int:
        return len(self.names)

    def to_bytes(self) -> bytes:
        """The file's bytes; equal checkpoints give equal bytes under one version of torch."""
        content = {
            "format": FORMAT,
            "symbol": self.symbol,
            "run": self.run,
            "smoke": self.smoke,
            "input_size": self.input_size,
            "names": list(self.names),
            "catalog": self.catalog,
            "feature_version": self.feature_version,
            "scaler": {
                "mean": torch.from_numpy(self.scaler.mean),
                "scale": torch.from_numpy(self.scaler.scale),
                "clip": self.scaler.clip,
            },
            "architecture": {"kind": "PriceLSTM", **self.config.model_dump(mode="json")},
            "weights": {name: tensor.detach().cpu() for name, tensor in self.weights.items()},
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, origin: str) -> Checkpoint:
        """Opens a checkpoint on the CPU, without running any code it may carry. ``origin`` names it in errors.

        Raises CheckpointError when it is unreadable, of another format, or its own counts differ.
        """
        try:
            content: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise CheckpointError(f"{origin} is no checkpoint that torch opens with weights_only: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise CheckpointError(f"{origin} has format {found!r}, this code reads format {FORMAT}: train it again")
        architecture = dict(content["architecture"])
        if (kind := architecture.pop("kind")) != "PriceLSTM":
            raise CheckpointError(f"{origin} is a {kind}, this code builds PriceLSTM only")
        config = TrainConfig.model_validate(architecture)
        scaler = content["scaler"]
        made_for = int(content["weights"]["lstm.weight_ih_l0"].shape[1])
        counts = {
            "input_size": content["input_size"],
            "names": len(content["names"]),
            "weights": made_for,
            "scaler": len(scaler["mean"]),
        }
        if len(set(counts.values())) != 1:
            raise CheckpointError(f"{origin} contradicts itself (feature mismatch between the three counts): {counts}")
        return cls(
            symbol=content["symbol"],
            run=content["run"],
            smoke=content["smoke"],
            names=tuple(content["names"]),
            catalog=content["catalog"],
            feature_version=content["feature_version"],
            scaler=Scaler(scaler["mean"].numpy(), scaler["scale"].numpy(), float(scaler["clip"])),
            config=config,
            weights=content["weights"],
        )

    def network(self) -> PriceLSTM:
        """The network with the trained weights, on the CPU, in evaluation mode."""
        network = PriceLSTM(self.input_size, self.config)
        network.load_state_dict(self.weights)
        return network.eval()

    def predict(self, rows: Floats) -> float:
        """Probability of UP for one window: ``rows`` (sequence, input_size) of unscaled features, oldest first.

        ValueError when the shape is another or a value is not finite.
        """
        expected = (self.config.sequence, self.input_size)
        if rows.shape != expected:
            raise ValueError(f"{self.symbol}: a window of shape {rows.shape} where the model takes {expected}")
        if not np.isfinite(rows).all():
            bad = [self.names[c] for c in np.flatnonzero(~np.isfinite(rows).all(axis=0))]
            raise ValueError(f"{self.symbol}: null, NaN or infinite in {', '.join(bad)}")
        with torch.inference_mode():
            logit = self.network()(torch.from_numpy(self.scaler.transform(rows)).unsqueeze(0))
        return float(torch.sigmoid(logit.double()).item())
