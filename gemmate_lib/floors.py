"""What the best possible reader would reach on these very rows, and what needs no model at all."""

import math
from collections import Counter

import numpy as np

from gemmate_lib.data import Row
from gemmate_lib.forms import QUOTE_TEMPLATE
from gemmate_lib.metrics import Sums
from gemmate_lib.tiny.sayings import posterior, surprisal
from gemmate_lib.tiny.twins import accuracy_ceiling


def is_standard(row: Row) -> bool:
    """Other templates have no author's line to ask for: their rows are evaluated as plain texts."""
    return row.completion == QUOTE_TEMPLATE.format_map(row.fields)


def quote_floors(rows: list[Row], chosen: list[Row], losses: dict[str, Sums]) -> dict[str, float]:
    """Return what the grammar behind `tiny_quotes` would reach; nothing for other quotes.

    A row that it could not have written, one in capitals say, counts as free: floors stay floors.
    """
    best, foreign = [], 0
    for row in rows:
        try:
            chance = posterior(row.fields["quote"])
            author = -math.log(chance[row.fields["author"]])
            best.append((surprisal(row.fields["quote"]), author, max(chance.values())))
        except (ValueError, KeyError, ZeroDivisionError):  # no saying, or author, of the grammar
            best.append((0.0, 0.0, 1.0))
            foreign += 1
    if foreign > 0.1 * len(rows):
        return {}
    quote, author, _ = np.sum(best, axis=0)
    return {
        "quote_perplexity": math.exp(quote / losses["quote"][1].sum()),
        "author_perplexity": math.exp(author / losses["author"][1].sum()),
        "author_accuracy": float(np.mean(best[: len(chosen) or None], axis=0)[2]),
    }


def twin_floors(source: str, rows: list[Row]) -> dict[str, float]:
    """Return what an ideal reader reaches on an embedded twin; nothing for other data."""
    if source == "tiny_reviews":
        return {"accuracy": accuracy_ceiling([row.fields["sentence"] for row in rows])}
    return {"exact": 1.0, "f1": 1.0} if source == "tiny_questions" else {}


def baselines(train: list[Row], test: list[Row]) -> dict[str, list[str]]:
    """Label each test row by the commonest label, and by logistic regression on TF-IDF of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = ([row.fields[key] for row in train] for key in ("sentence", "label"))
    found = {"majority": [Counter(labels).most_common(1)[0][0]] * len(test)}
    if len(set(labels)) > 1:
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=999))
        guesses = model.fit(texts, labels).predict([row.fields["sentence"] for row in test])
        found["tfidf"] = [str(guess) for guess in guesses]
    return found
