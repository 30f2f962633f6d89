"""The one error of this package."""


class FeatureError(ValueError):
    """The features cannot be computed or are not what the catalog says; the message names the input, the column and the row.

    Trying again changes nothing: the input or the code has to.
    """
