"""The base of Colab's errors."""


class Error(Exception):
    """Any error of Colab."""
