"""Data cards: the documentation of a data set, and the check that it is the one documented.

A card is Markdown with YAML front matter in the Hub's dataset-card format plus `source`, `splits`,
`features`, `sha256`, `format` and `defects` (https://huggingface.co/docs/hub/datasets-cards).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from gemmate_lib.config import GemmateError, among


class Source(BaseModel, extra="forbid", frozen=True):
    """Where the rows come from: the Hub, a generator of this library, or a file by the card."""

    hub_id: str | None = None
    config: str | None = None  # one of the Hub data set's configurations
    names: dict[str, str] = {}  # our name of a split -> theirs
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    generator: str | None = Field(None, pattern=r"^gemmate_lib(\.\w+)+:\w+$")  # no foreign code
    seed: int | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if sum(origin is not None for origin in (self.hub_id, self.generator, self.file)) != 1:
            raise ValueError("give one of hub_id, generator, file")
        return self


class Card(BaseModel, extra="forbid", frozen=True):
    """Front matter and body; unknown keys are refused, or a misspelt one would disable a check."""

    name: str
    path: Path
    body: str
    pretty_name: str
    license: str
    language: list[str]
    task_categories: list[str] = []
    source: Source
    format: str  # a form of gemmate_lib.forms
    splits: dict[str, int]  # rows in each
    features: dict[str, str]  # name -> string, int, list[string] …; "absent or string"
    sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")  # of the train split; None: unchecked
    defects: list[str]


def shipped(name: str, pattern: str) -> dict[str, Path]:
    """Return the files of a folder by their stems: those of the wheel, or of the checkout."""
    folders = (Path(__file__).parents[up] / name for up in (0, 1))
    return {path.stem: path for folder in folders for path in sorted(folder.glob(pattern))}


def card_paths() -> dict[str, Path]:
    """Return the cards by name."""
    return shipped("data_cards", "*.md")


def read_card(name_or_path: str | Path) -> Card:
    """Read a card by the name of its data set, or from a Markdown file.

    Raises: GemmateError for an unknown card, one without front matter, or a wrong field.
    """
    path = Path(name_or_path)
    if path.suffix != ".md" or not path.is_file():
        path = card_paths()[among(str(name_or_path), card_paths(), "data card")]
    start, _, rest = path.read_text("utf-8").partition("---\n")
    matter, fence, body = rest.partition("\n---\n")
    try:
        fields = yaml.safe_load(matter)
        if start or not fence or not isinstance(fields, dict):
            raise GemmateError(f"{path} has no front matter. Begin it with YAML between --- lines.")
        return Card.model_validate(fields | {"name": path.stem, "path": path, "body": body.strip()})
    except yaml.YAMLError as error:
        raise GemmateError(f"{path}: malformed YAML front matter. Mend it.") from error
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise GemmateError(f"{path}: {where}: {error.errors()[0]['msg']}. Mend it.") from error


def card_checksum(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the sha256 of the rows as canonical JSON Lines: UTF-8, keys sorted."""
    lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def verify(card: Card, table: Sequence[Mapping[str, Any]], *, split: str = "train") -> None:
    """Refuse a split that is not as its card says.

    Raises: GemmateError naming the first field that differs, with what was expected and found.
    """
    _same(card, f"splits.{split}", card.splits.get(split), len(table))
    for number, row in enumerate(table):
        optional = {name for name in card.features if name not in row and _absent(card, name)}
        found = sorted({*map(str, row), *optional})
        _same(card, f"features of row {number}", sorted(card.features), found)
        for name in card.features.keys() - optional:
            kind = _kind(row[name])
            if kind not in card.features[name].split(" or "):
                _same(card, f"features.{name} of row {number}", card.features[name], kind)
    if card.sha256 and split == "train":
        _same(card, "sha256", card.sha256, card_checksum(table))


def features_of(table: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what a card says of a table's fields: all the kinds of each, rare ones too."""
    names = list(dict.fromkeys(str(name) for row in table for name in row))
    kinds = {n: {_kind(row[n]) if n in row else "absent" for row in table} for n in names}
    return {name: " or ".join(sorted(found)) for name, found in kinds.items()}


def _absent(card: Card, name: str) -> bool:
    return "absent" in card.features[name].split(" or ")


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"list[{'|'.join(sorted({_kind(item) for item in value})) or 'string'}]"
    return {"str": "string", "dict": "object"}.get(type(value).__name__, type(value).__name__)


def _same(card: Card, field: str, expected: Any, found: Any) -> None:
    if expected != found:
        problem = f"{card.name} does not match its card: {field}: expected {expected}"
        raise GemmateError(f"{problem}, found {found}. Restore the data, or correct the card.")
