"""A trained model's logits at any anchors, with some columns taken from elsewhere: what ``importance`` asks for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crpbot_lib.training.config import TrainConfig
from crpbot_lib.training.dataset import Dataset, Floats, Ints
from crpbot_lib.training.model import PriceLSTM
from crpbot_lib.training.notices import Notices
from crpbot_lib.training.trainer import Windows

_BATCH = 4096


class Scorer:
    """One trained network and its data on ``device``. Raises Interrupted between two batches when ``notices`` say so."""

    def __init__(
        self, data: Dataset, config: TrainConfig, weights: dict[str, Tensor], device: torch.device, notices: Notices
    ) -> None:
        self._windows = Windows(data, config.sequence, device)
        self._notices = notices
        self._network = PriceLSTM(data.values.shape[1], config).to(device)
        self._network.load_state_dict(weights)
        self._network.eval()

    def __call__(self, anchors: Ints, donors: Ints, columns: Sequence[int]) -> Floats:
        """Logits of UP at ``anchors``; ``columns`` of each window come from the window of the donor at its place."""
        found = []
        own, other = (torch.split(torch.from_numpy(of).to(self._windows.device), _BATCH) for of in (anchors, donors))
        taken = torch.tensor(columns, dtype=torch.long, device=self._windows.device)
        with torch.inference_mode():
            for at, donor in zip(own, other, strict=True):
                self._notices.check()
                rows = self._windows(at)[0]
                if len(columns):
                    rows[:, :, taken] = self._windows(donor)[0][:, :, taken]
                found.append(self._network(rows).cpu().numpy())
        return np.concatenate(found)
