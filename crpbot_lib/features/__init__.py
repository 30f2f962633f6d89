"""The features of a model: the catalog, and the one computation that training files and the live runtime share.

Knows nothing of S3, HTTP or torch.
"""

from crpbot_lib.features.engineer import engineer_features
from crpbot_lib.features.errors import FeatureError, NoRowError
from crpbot_lib.features.runtime import DataFetcher, engineer_runtime_features

__all__ = ["DataFetcher", "FeatureError", "NoRowError", "engineer_features", "engineer_runtime_features"]
