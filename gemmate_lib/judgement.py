"""What a judge said of a blind sheet: read back with its key, and told with its interval."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemmate_lib.config import GemmateError
from gemmate_lib.formats import read_table
from gemmate_lib.judge import CHOICES, COLUMNS, Key, text_hash, text_of
from gemmate_lib.stats import Interval, wilson


@dataclass(frozen=True)
class Judgement:
    """Run B against run A. preference: the share of the decided pairs that went to B.

    ties: with the `equal` pairs, which nobody was shown. unanswered: no choice, or no row.
    """

    run_a: str
    run_b: str
    wins: int
    losses: int
    ties: int
    equal: int
    skipped: int
    unanswered: int
    preference: Interval
    p_value: float

    def verdict(self) -> str:
        """Return which run is preferred, where the interval and the test both exclude noise."""
        low, high = self.preference.low, self.preference.high
        if self.p_value >= 0.05 or low <= 0.5 <= high:
            return "within noise"
        return "B preferred" if low > 0.5 else "A preferred"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON: the preference is None where no pair is decided."""
        found = asdict(self) | {"verdict": self.verdict()}
        if not self.preference.n:
            found["preference"]["value"] = None
        return found

    def lines(self) -> list[str]:
        """Return the result for people."""
        share = str(self.preference) if self.preference.n else "open, no pair is decided"
        return [
            f"A is {self.run_a}, B is {self.run_b}",
            f"B wins {self.wins}, loses {self.losses}, ties {self.ties} ({self.equal} of them "
            f"equal, not shown); {self.skipped} skipped, {self.unanswered} unanswered",
            f"preference for B        {share}  p={self.p_value:.3g}  {self.verdict()}",
        ]


def read_judgement(filled: Path, key_file: Path) -> Judgement:
    """Read a filled sheet back, whether the page or a spreadsheet saved it.

    Raises: GemmateError for a file that cannot be read, and naming the row whose pair is unknown
        or there twice, whose texts are not the key's, or whose choice is none.
    """
    from scipy import stats

    try:
        key = Key.model_validate_json(key_file.read_text("utf-8"))
    except (OSError, ValueError):
        raise GemmateError(f"{key_file} is no key. Give the .key.json beside the sheet.") from None
    said: dict[str, str] = {}
    for number, record in enumerate(read_table(filled), start=2):  # row 1 names the columns
        where = f"{filled}, row {number}"
        if not (cells := _read_cells(record, where=where)):
            continue
        pair, choice = _read_row(cells, key, where=where)
        if pair in said:
            raise GemmateError(f"{where}: pair {pair} is there twice. Keep one of the rows.")
        said[pair] = choice
    sides = [(key.pairs[pair], choice) for pair, choice in said.items()]
    count = Counter({"left": e.left, "right": e.right}.get(c, c) for e, c in sides)
    wins, losses = count["B"], count["A"]
    decided = wins + losses
    return Judgement(
        key.run_a, key.run_b, wins, losses, count["tie"] + key.equal, key.equal,
        skipped=count["skip"],
        unanswered=len(key.pairs) - len(said) + count[""],
        preference=wilson(wins, decided),
        p_value=float(stats.binomtest(wins, decided).pvalue) if decided else 1.0,
    )  # fmt: skip


def _read_cells(record: dict[str, Any], *, where: str) -> dict[str, str]:
    """Return the cells by column; none of an empty row, which a spreadsheet may save."""
    named = {name.strip().lower(): value for name, value in record.items()}
    if missing := [name for name in COLUMNS if name not in named]:
        remedy = "Save it as CSV with commas, all columns kept."
        raise GemmateError(f"{where}: no column {', '.join(missing)}. {remedy}")
    cells = {name: str(named[name] or "") for name in COLUMNS}
    return cells if any(text.strip() for text in cells.values()) else {}


def _read_row(cells: dict[str, str], key: Key, *, where: str) -> tuple[str, str]:
    """Return the pair and the choice of a row, "" for none."""
    pair, choice = cells["pair"].strip(), cells["choice"].strip().lower()
    if pair not in key.pairs:
        raise GemmateError(f"{where}: the key has no pair {pair!r}. Give this sheet's own key.")
    found = tuple(text_hash(text_of(cells[name])) for name in ("prompt", "left", "right"))
    if found != key.pairs[pair].sha256:
        remedy = "Give this sheet's own key, and change choices alone."
        raise GemmateError(f"{where}: the texts of pair {pair} are not the key's. {remedy}")
    if choice and choice not in CHOICES:
        remedy = f"Write {', '.join(CHOICES)}, or nothing."
        raise GemmateError(f"{where}: {choice!r} is no choice for pair {pair}. {remedy}")
    return pair, choice
