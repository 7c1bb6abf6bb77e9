"""What is to run: notebooks with their parameters, all checked before the first one starts."""

import ast
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from gemmate_lib.config import GemmateError, among

CORE = tuple(f"{number:02}" for number in range(7))
TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
_UNSAFE = re.compile(r"[^\w.-]+")
_SECRET = re.compile(r"hf_\w{16,}|(?i:(^|_)(token|secret|password|api_?key)$)")


def find_notebooks() -> dict[str, Path]:
    """The course's notebooks by number, in order: the checkout's, else those in the package."""
    here = Path(__file__).parent
    checkout = (here.parent / "pyproject.toml").is_file()
    folder = here.parent / "notebooks" if checkout else here / "notebooks"
    return {file.stem[:2]: file for file in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}


NOTEBOOKS = find_notebooks()


@dataclass(frozen=True)
class Job:
    """One notebook with its parameters; in a grid, `point` holds those that vary."""

    number: str
    source: Path
    parameters: Mapping[str, Any]
    point: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The notebook's name, and its point of the grid; it names the files of the job."""
        values = (f"{key}={_UNSAFE.sub('_', str(value))}" for key, value in self.point.items())
        return "--".join([self.source.stem, *values])[:120]

    def fits(self, other: "Job") -> bool:
        """Whether both stand at the same point of the grid, as far as they share it."""
        return all(other.point.get(name, value) == value for name, value in self.point.items())


def select(only: Sequence[str] = ()) -> dict[str, Path]:
    """The notebooks to run, in order: the core, or "all", or by number or name, as "03".

    Raises: GemmateError for a notebook that is not there, naming the nearest.
    """
    if not NOTEBOOKS:
        raise GemmateError("There are no notebooks here. Run this in a checkout of the course.")
    names = {key: n for n, path in NOTEBOOKS.items() for key in (n, str(int(n)), path.stem)}
    wanted = list(only) or [number for number in NOTEBOOKS if number in CORE]
    if "all" in wanted:
        wanted = list(NOTEBOOKS)
    chosen = {names[among(name.removesuffix(".ipynb"), names, "notebook")] for name in wanted}
    return {number: path for number, path in NOTEBOOKS.items() if number in chosen}


def known_parameters(notebook: Path) -> dict[str, str]:
    """The names set in the cell tagged `parameters`, each with its type; none without the cell.

    The type is the annotation, else that of the default; "None" where neither tells.
    """
    from papermill import inspect_notebook

    # papermill formats the path it is given.
    found = inspect_notebook(str(notebook).replace("{", "{{").replace("}", "}}"))
    annotated = {name: about["inferred_type_name"] for name, about in found.items()}
    defaults = {name: about["default"] for name, about in found.items()}
    return {
        name: kind if kind != "None" else type(ast.literal_eval(defaults[name])).__name__
        for name, kind in annotated.items()
    }


def _typed(name: str, value: Any, kind: str) -> Any:
    """The value as the parameter's type. Raises: GemmateError where it is none."""
    if value is None or value == "null":
        return None
    if kind not in TYPES:
        return yaml.safe_load(value) if isinstance(value, str) else value
    try:
        return TypeAdapter(TYPES[kind], config={"coerce_numbers_to_str": True}).validate_python(
            value
        )
    except ValidationError:
        raise GemmateError(f"The parameter {name} takes {kind}, not {value!r}.") from None


def check_parameters(
    parameters: Mapping[str, Any], chosen: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    """For each notebook those of the parameters that it has, in their types.

    Raises: GemmateError for a parameter that no notebook has (papermill would only warn), one of
    a wrong type, and what looks like a secret (papermill stores parameters in the notebook).
    """
    if not parameters:
        return {number: {} for number in chosen}
    known = {number: known_parameters(path) for number, path in chosen.items()}
    everywhere = sorted(set().union(*known.values()))
    for name, value in parameters.items():
        if _SECRET.search(name) or _SECRET.search(str(value)):
            raise GemmateError(f"{name} looks like a secret. Set HF_TOKEN in the environment.")
        if name not in everywhere:
            names = ", ".join(everywhere) or "none, for no cell is tagged `parameters`"
            raise GemmateError(f"No notebook has the parameter {name!r}. Known are: {names}.")
    return {
        number: {k: _typed(k, v, kinds[k]) for k, v in parameters.items() if k in kinds}
        for number, kinds in known.items()
    }


def read_pairs(pairs: Sequence[str], example: str) -> dict[str, str]:
    """NAME=VALUE, each as text. Raises: GemmateError for no such pair, and a name given twice."""
    given: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise GemmateError(f"{pair!r} is no NAME=VALUE. Write it as {example}.")
        if name in given:
            raise GemmateError(f"{name} is given twice. Give it once.")
        given[name] = value
    return given


def read_grid(pairs: Sequence[str]) -> dict[str, list[str]]:
    """NAME=VALUE,VALUE to the values of each name. Raises: GemmateError for a malformed pair."""
    return {n: text.split(",") for n, text in read_pairs(pairs, "--grid lora_r=4,8").items()}


def plan(
    only: Sequence[str], parameters: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]
) -> list[Job]:
    """Every job in the order of its start: each notebook at each point of the grid.

    A notebook that has none of the grid's parameters runs once. Raises: GemmateError as above.
    """
    chosen = select(only)
    if both := sorted(set(grid) & set(parameters)):
        raise GemmateError(f"{both[0]} is both a parameter and in the grid. Give it once.")
    jobs: dict[str, Job] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        given = check_parameters({**parameters, **point}, chosen)
        for number, source in chosen.items():
            here = {name: given[number][name] for name in point if name in given[number]}
            job = Job(number, source, given[number], here)
            jobs.setdefault(job.name, job)
    return list(jobs.values())
