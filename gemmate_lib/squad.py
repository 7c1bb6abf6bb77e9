"""SQuAD v2: exact match and F1 where some questions have no answer, and the native files.

The arithmetic is that of the official evaluate-v2.0.py, its oddities included, so that a number
from here stands beside published ones. Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemmate_lib.config import GemmateError
from gemmate_lib.stats import Interval, bootstrap, wilson

_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII: “ and – stay
_ARTICLE = re.compile(r"\b(?:an?|the)\b")


def normalize_answer(text: str) -> str:
    """Return a text in lower case without ASCII punctuation, English articles, surplus space."""
    # Punctuation goes before the articles do: "a.n." is an article, "a-b" is the word "ab".
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def tokens_of(text: str) -> list[str]:
    """Return the words of a text after normalisation."""
    return normalize_answer(text).split()


def exact(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 where the prediction equals any of the golds after normalisation, else 0.0.

    Golds that normalise to nothing do not count. Where none is left, only an empty answer is right.
    Raises: GemmateError where golds is one text and not a list of them.
    """
    return float(normalize_answer(prediction) in map(normalize_answer, _right(golds)))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the best F1 of shared words over the golds, 0..1; golds count as in `exact`.

    Raises: GemmateError where golds is one text and not a list of them.
    """
    own = tokens_of(prediction)
    return max(_overlap(own, tokens_of(gold)) for gold in _right(golds))


def _right(golds: Sequence[str]) -> list[str]:
    if isinstance(golds, str):  # its letters would be taken for answers
        raise GemmateError(f"The golds {golds!r} are one text. Give a list of texts.")
    return [gold for gold in golds if normalize_answer(gold)] or [""]


def _overlap(own: list[str], gold: list[str]) -> float:
    if not own or not gold:
        return float(own == gold)
    if not (shared := (Counter(own) & Counter(gold)).total()):
        return 0.0
    # Not 2 * shared / (len(own) + len(gold)): the last bit may decide between two thresholds.
    precision, recall = shared / len(own), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class SquadScores:
    """The scores of each row, in the order of the golds, 0..1, once the threshold is applied."""

    exact: list[float]
    f1: list[float]
    answerable: list[bool]
    best: dict[str, float]  # best_exact … best_f1_thresh; empty without no-answer probabilities

    def official(self) -> dict[str, float]:
        """Return what the official script prints: its names, its order, its percentages."""
        found: dict[str, float] = {}
        for part, rows in self._parts().items():
            found[part + "exact"] = 100.0 * sum(self.exact[i] for i in rows) / len(rows)
            found[part + "f1"] = 100.0 * sum(self.f1[i] for i in rows) / len(rows)
            found[part + "total"] = len(rows)
        return found | self.best

    def metrics(self, seed: int = 0) -> dict[str, Interval]:
        """Return exact and f1 under the official names, 0..1, with 95 % intervals."""
        found: dict[str, Interval] = {}
        for part, rows in self._parts().items():
            found[part + "exact"] = wilson(int(sum(self.exact[i] for i in rows)), len(rows))
            found[part + "f1"] = bootstrap([self.f1[i] for i in rows], seed=seed)
        return found

    def _parts(self) -> dict[str, list[int]]:
        """Prefix of the official names -> rows; a part without rows is left out."""
        rows = range(len(self.answerable))
        has = [i for i in rows if self.answerable[i]]
        none = [i for i in rows if not self.answerable[i]]
        parts = {"": list(rows), "HasAns_": has, "NoAns_": none}
        return {name: own for name, own in parts.items() if own}


def score(
    predictions: Mapping[str, str],
    golds: Mapping[str, Sequence[str]],
    *,
    no_answer: Mapping[str, float] | None = None,
    threshold: float = 1.0,
) -> SquadScores:
    """Score the answers to questions by id; an answer of "" says that there is none.

    no_answer: the probability that a question has no answer. Above the threshold (not at it) the
    prediction counts as empty. A question is answerable where it has any gold, be it only "the".
    Raises: GemmateError for no golds, ids that differ, a prediction that is no text, or a NaN.
    """
    nulls = dict.fromkeys(golds, 0.0) if no_answer is None else no_answer
    _check(predictions, golds, nulls, threshold)
    raw = {
        "exact": {key: exact(predictions[key], own) for key, own in golds.items()},
        "f1": {key: f1(predictions[key], own) for key, own in golds.items()},
    }
    has = {key: len(own) > 0 for key, own in golds.items()}
    best: dict[str, float] = {}
    for name, scores in raw.items() if no_answer is not None else ():
        # A row without an answer has its point until a prediction is kept that is not "".
        worth = {key: scores[key] if has[key] else -float(predictions[key] != "") for key in golds}
        empty = len(has) - sum(has.values())
        best[f"best_{name}"], best[f"best_{name}_thresh"] = _best_threshold(worth, nulls, empty)
    final = {
        name: [float(not has[key]) if nulls[key] > threshold else scores[key] for key in golds]
        for name, scores in raw.items()
    }
    return SquadScores(**final, answerable=list(has.values()), best=best)


def _check(
    predictions: Mapping[str, str],
    golds: Mapping[str, Sequence[str]],
    nulls: Mapping[str, float],
    threshold: float,
) -> None:
    if not golds:
        raise GemmateError("There are no golds to score against. Give at least one question.")
    _same_ids("predictions", predictions, golds)
    _same_ids("no-answer probabilities", nulls, golds)
    if odd := [key for key in golds if not isinstance(predictions[key], str)]:
        raise GemmateError(f'The prediction for {odd[0]!r} is no text. Give "" for no answer.')
    if math.isnan(threshold) or any(math.isnan(value) for value in nulls.values()):
        raise GemmateError("A no-answer probability or the threshold is NaN. Did a run diverge?")


def _same_ids(what: str, given: Collection[str], golds: Collection[str]) -> None:
    missing = [key for key in golds if key not in given]
    surplus = [key for key in given if key not in golds]
    if missing or surplus:
        example = f"missing {missing[0]!r}" if missing else f"surplus {surplus[0]!r}"
        counts = f"{len(missing)} ids missing, {len(surplus)} surplus"
        raise GemmateError(f"The {what} do not fit the golds: {counts}, such as {example}. "
                           "Give one for each question, and no other.")  # fmt: skip


def _best_threshold(
    worth: Mapping[str, float], no_answer: Mapping[str, float], empty: int
) -> tuple[float, float]:
    """Return the best score in percent and its threshold.

    At first nothing is kept, which is right for the `empty` rows and has threshold 0.0. Then the
    predictions are kept one by one as the probability rises, equal ones in the order of
    `no_answer`; each adds its worth. The first of equal scores wins. As officially, the scores
    between equal probabilities compete too, although no threshold parts them.
    """
    order = sorted(no_answer, key=lambda key: no_answer[key])
    totals = np.cumsum([float(empty), *(worth[key] for key in order)])  # cumsum adds in order
    first = int(np.argmax(totals))
    threshold = float(no_answer[order[first - 1]]) if first else 0.0
    return 100.0 * float(totals[first]) / len(worth), threshold


def read_squad(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """Read a native SQuAD file, v1 or v2, into records as rajpurkar/squad_v2 on the Hub has them.

    A record: id, title, context, question, answers {text: [...], answer_start: [...]}, the starts
    in characters; no golds where there is no answer. Plausible answers are left out.
    Returns also how many answers do not stand where answer_start says; they are kept.
    Raises: GemmateError where the file cannot be read, is malformed, or has an id twice.
    """
    try:
        whole = json.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise GemmateError(f"{path} cannot be read ({error.strerror}). Check the path.") from error
    except ValueError as error:  # of the encoding, or of the JSON
        raise GemmateError(f"{path} is not JSON in UTF-8: {error}. Get it anew.") from error
    try:
        records = [_record(*found) for found in _questions(whole)]
    except GemmateError as error:
        raise GemmateError(f"{path}: {error} Mend it there.") from error
    if not records:
        raise GemmateError(f"{path} holds no questions. Give a file with data.")
    twice = [key for key, count in Counter(each["id"] for each in records).items() if count > 1]
    if twice:
        raise GemmateError(f"{path} has the id {twice[0]!r} more than once. Make the ids differ.")
    return records, sum(map(_misplaced, records))


def _questions(whole: Any) -> Iterator[tuple[str, str, str, Any]]:
    """Yield where a question stands, its title and context, and itself."""
    for i, article in enumerate(_field(whole, "data", list, "the file")):
        place = f"data[{i}]"
        title = _field(article, "title", str, place)
        for j, paragraph in enumerate(_field(article, "paragraphs", list, place)):
            inner = f"{place}.paragraphs[{j}]"
            context = _field(paragraph, "context", str, inner)
            for k, question in enumerate(_field(paragraph, "qas", list, inner)):
                yield f"{inner}.qas[{k}]", title, context, question


def _record(place: str, title: str, context: str, question: Any) -> dict[str, Any]:
    key, asked = _field(question, "id", str, place), _field(question, "question", str, place)
    answers = _field(question, "answers", list, place)
    at = [f"{place}.answers[{i}]" for i in range(len(answers))]
    texts = [_field(each, "text", str, at[i]) for i, each in enumerate(answers)]
    starts = [_field(each, "answer_start", int, at[i]) for i, each in enumerate(answers)]
    if "is_impossible" in question and _field(question, "is_impossible", bool, place) and answers:
        raise GemmateError(f"{place} has answers, but is_impossible says that there is none.")
    named = {"id": key, "title": title, "context": context, "question": asked}
    return named | {"answers": {"text": texts, "answer_start": starts}}


def _field(holder: Any, name: str, kind: type, place: str) -> Any:
    if not isinstance(holder, dict):
        raise GemmateError(f"{place} is no object with named fields.")
    if name not in holder:
        raise GemmateError(f"{place} lacks {name!r}.")
    if type(holder[name]) is not kind:  # isinstance would take true for an int
        raise GemmateError(f"{name!r} of {place} is of type {type(holder[name]).__name__}, "
                           f"not {kind.__name__}.")  # fmt: skip
    return holder[name]


def _misplaced(record: dict[str, Any]) -> int:
    context, pairs = record["context"], zip(*record["answers"].values(), strict=True)
    # startswith would count a negative start from the end of the context
    return sum(start < 0 or not context.startswith(text, start) for text, start in pairs)
