"""The errors of this package."""


class FeatureError(ValueError):
    """The features cannot be computed or are not what the catalog says; the message names the input, the column and the row.

    Trying again changes nothing: the input or the code has to.
    """


class NoRowError(FeatureError):
    """The newest minute has no row, so there is nothing to decide on; the message names what it lacks. The next one may have."""
