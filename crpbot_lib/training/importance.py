"""What a group of features is worth to a trained model: how much worse it gets when the group tells of another time. numpy only.

Permutation importance (Breiman 2001) of whole groups: the test anchors are cut into blocks of time and the blocks shuffled; each
window keeps its own minutes for all other features and takes the group's columns from the window at its place in the shuffled
order. So a group's columns stay together and stay a true window, only of the wrong time. A group that nothing is lost without was
not used, or tells what others tell as well: features that say the same hide each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from crpbot_lib.training.bootstrap import LEVEL, Values, block_minutes
from crpbot_lib.training.dataset import Floats, Ints
from crpbot_lib.training.evaluation import Scores, bounded

REPEATS = 3
MOST_WINDOWS = 20_000
"""Of more test anchors every so-manieth is taken: neighbours share most of their label and of their window."""
_MINUTE_US = 60_000_000
Score = Callable[[Ints, Ints, Sequence[int]], Floats]
"""(anchors, donors, columns) -> logits at the anchors, where ``columns`` come from the windows of the donors."""


def shuffled(timestamps: Ints, minutes: int, rng: np.random.Generator) -> Ints:
    """An order of the rows in which blocks of ``minutes`` (by the clock) are shuffled and stay whole."""
    blocks = np.split(np.arange(len(timestamps)), np.flatnonzero(np.diff(timestamps // (minutes * _MINUTE_US))) + 1)
    order: Ints = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
    return order


def importance(
    score: Score,
    test: Ints,
    timestamps: Ints,
    labels: Floats,
    groups: Mapping[str, Sequence[int]],
    horizon: int,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Any]:
    """Per group what is lost without it: ``accuracy_lost`` and ``log_loss_gained`` (means over ``REPEATS`` orders), with intervals.

    ``test``: the anchors; ``timestamps``, ``labels``: of every row of the data set. ``groups``: name -> columns.
    """
    taken = test[:: -(-len(test) // MOST_WINDOWS)]
    at, came = timestamps[taken], labels[taken]
    rng = np.random.default_rng(seed)
    minutes = block_minutes(len(test), horizon)
    orders = [shuffled(at, minutes, rng) for _ in range(REPEATS)]
    true = Scores(at, score(taken, taken, ()), came)
    found: list[dict[str, Any]] = []
    for name, columns in groups.items():
        worse = [Scores(at, score(taken, taken[order], columns), came) for order in orders]
        accuracy: Values = true.hits - np.mean([of.hits for of in worse], axis=0)
        loss: Values = np.mean([of.losses() for of in worse], axis=0) - true.losses()
        lost = bounded("accuracy_lost", accuracy, at, horizon, level) | bounded("log_loss_gained", loss, at, horizon, level)
        found.append({"group": name, "features": len(columns), **lost})
    return {"windows": len(taken), "block_minutes": minutes, "repeats": REPEATS, "groups": found}
