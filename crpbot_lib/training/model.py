"""The network: an LSTM over one window, one logit of UP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crpbot_lib.training.config import TrainConfig


class PriceLSTM(nn.Module):
    """(batch, sequence, input_size) scaled features -> (batch,) logits.

    The head reads the last state of each direction of the top layer: the forward one after the newest row, the backward one
    after the oldest. Both directions see the window only, which ends at the decision.
    """

    def __init__(self, input_size: int, config: TrainConfig) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            input_size,
            config.hidden,
            num_layers=config.layers,
            batch_first=True,
            bidirectional=config.bidirectional,
            # torch applies it between layers and warns where there is only one
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        self.directions = 2 if config.bidirectional else 1
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden * self.directions, 1)

    def forward(self, windows: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(windows)
        last = torch.cat(list(hidden[-self.directions :]), dim=1)
        logits: Tensor = self.head(self.dropout(last)).squeeze(1)
        return logits
