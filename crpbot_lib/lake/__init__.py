"""The lake: one bucket or directory, its layout of keys, and whole, atomic reads and writes."""

from crpbot_lib.lake import keys
from crpbot_lib.lake.store import KeyExistsError, KeyMissingError, Lake, LakeError, UnreadableError

__all__ = ["KeyExistsError", "KeyMissingError", "Lake", "LakeError", "UnreadableError", "keys"]
