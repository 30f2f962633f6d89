"""The registry: published model versions, and which of them the runtime follows."""

from crpbot_lib.registry.errors import AlignmentError, PromotionRefusedError, RegistryError
from crpbot_lib.registry.promotion import champions, check_promotable, promote, rollback
from crpbot_lib.registry.versions import diff, download, list_versions, load_model, publish, show, verify

__all__ = [
    "AlignmentError",
    "PromotionRefusedError",
    "RegistryError",
    "champions",
    "check_promotable",
    "diff",
    "download",
    "list_versions",
    "load_model",
    "promote",
    "publish",
    "rollback",
    "show",
    "verify",
]
