"""Packages that only some of the project's extras bring."""

import importlib.util

from gemmate_lib.config import GemmateError


def need(package: str, what: str, *, extra: str, otherwise: str = "") -> None:
    """Raise GemmateError where a package of an extra is not installed.

    what: what needs it. otherwise: what mends it as well, as in ", or leave it out".
    """
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # the package around it
        found = None
    if found is None:
        remedy = f'Run pip install "gemmate-course[{extra}]"{otherwise}.'
        raise GemmateError(f"{what} needs {package}, which is not installed. {remedy}")
