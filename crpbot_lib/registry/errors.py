"""What the registry refuses."""

from __future__ import annotations


class RegistryError(Exception):
    """A version is absent, incomplete or in the way; the message names it."""


class AlignmentError(RegistryError):
    """Model, features file and run time do not carry the same features: the mission's "feature mismatch between the three
    counts", the usual cause of predictions stuck at 50 %."""


class PromotionRefusedError(RegistryError):
    """The version may not become the one the runtime follows; the message lists every reason."""
