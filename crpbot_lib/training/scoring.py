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

_BATCH = 4096


class Scorer:
    """One trained network and its data on ``device``. Raises Interrupted between two batches when ``notices`` say so."""

    def __init__(
        self, data: Dataset, config: TrainConfig, weights: dict[str, Tensor], device: torch.device, notices: Notices
    ) -> None:
        self._values = torch.from_numpy(data.values).to(device)
        self._offsets = torch.arange(1 - config.sequence, 1, device=device)
        self._notices = notices
        self._network = PriceLSTM(data.values.shape[1], config).to(device)
        self._network.load_state_dict(weights)
        self._network.eval()

    def __call__(self, anchors: Ints, donors: Ints, columns: Sequence[int]) -> Floats:
        """Logits of UP at ``anchors``; ``columns`` of each window come from the window of the donor at its place."""
        found = []
        own, other = (torch.split(torch.from_numpy(of).to(self._values.device), _BATCH) for of in (anchors, donors))
        taken = torch.tensor(columns, dtype=torch.long, device=self._values.device)
        with torch.inference_mode():
            for at, donor in zip(own, other, strict=True):
                self._notices.check()
                windows = self._values[at[:, None] + self._offsets]
                if len(columns):
                    windows[:, :, taken] = self._values[donor[:, None] + self._offsets][:, :, taken]
                found.append(self._network(windows).cpu().numpy())
        return np.concatenate(found)
