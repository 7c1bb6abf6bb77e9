"""What a data set is worth for its task, measured: size, relevance, diversity, copies, lengths …

Nothing here judges: `gemmate_lib.verdicts` says what to look at, `gemmate_lib.quality_page` shows.
"""

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import Form, load_dataset_splits
from gemmate_lib.examples import Example, read_examples
from gemmate_lib.metrics import distinct_n
from gemmate_lib.minhash import Pair, near_pairs
from gemmate_lib.patterns import encoding_problems, personal_data, redact
from gemmate_lib.splitting import normalise

TOPICS, CLASSES = 8, 20
NEAR = 0.8  # Jaccard of word 3-grams, as dataset.near_duplicate


class Topic(NamedTuple):
    """A cluster of texts: the words that set it apart, and how many rows it has."""

    words: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Relevance:
    """How near the rows are to a task.

    coverage: the share of the task's running words that occur in the rows.
    outside: rows less like the task's average than 95 % of the task's own texts are.
    """

    task: str
    coverage: float
    missing: tuple[str, ...]  # the commonest words of the task that no row has
    outside: tuple[int, ...]


@dataclass(frozen=True)
class Quality:
    """What was measured of a data set; rows are numbered from 0, as in the file."""

    source: str
    form: Form
    records: Sequence[Mapping[str, Any]]
    examples: list[Example]
    report: list[str]  # what the loader makes of it
    relevance: Relevance | None
    distinct: dict[int, float]  # n -> distinct word n-grams over all
    topics: list[Topic]
    copies: list[tuple[int, int]]  # (first, copy)
    near: list[Pair]  # by row
    balance: dict[str, int]  # class -> rows, the largest first
    characters: list[int]
    tokens: list[int]
    encodings: dict[str, list[int]]  # problem -> rows
    personal: dict[str, list[int]]  # kind -> rows
    conflicts: list[tuple[int, ...]]  # rows that ask the same and answer otherwise

    @property
    def spread(self) -> float:
        """The effective number of topics: exp of the entropy of their shares."""
        return effective(topic.rows for topic in self.topics)


def effective(counts: Any) -> float:
    """Return exp of the entropy of counts: 3.0 for three alike, 1.0 for one; 0.0 for none."""
    shares = np.array([count for count in counts if count], dtype=float)
    if not len(shares):
        return 0.0
    shares /= shares.sum()
    return math.exp(float(-(shares * np.log(shares)).sum()))


def examine(config: DatasetConfig, *, tokenizer: Any, task: DatasetConfig | None = None) -> Quality:
    """Measure the train rows of a file, a folder or a card.

    task: texts of what the model is to do, to measure relevance by.
    Raises: GemmateError where no row can be used.
    """
    records, form, examples = read_examples(config)
    texts = [each.text for each in examples]
    first: dict[str, int] = {}
    homes = [
        first.setdefault(normalise(text), each.row)
        for text, each in zip(texts, examples, strict=True)
    ]
    return Quality(
        source=config.train or config.id,
        form=form,
        records=records,
        examples=examples,
        report=_loading(config, tokenizer),
        relevance=None if task is None else _relevance(examples, task),
        distinct={n: distinct_n(texts, n) for n in (1, 2)},
        topics=_topics(texts),
        copies=[(home, e.row) for home, e in zip(homes, examples, strict=True) if home != e.row],
        near=[
            pair._replace(first=examples[pair.first].row, second=examples[pair.second].row)
            for pair in near_pairs(texts, threshold=NEAR)
        ],
        balance=_balance(examples),
        characters=[len(each.whole) for each in examples],
        tokens=_tokens(examples, tokenizer),
        encodings=_by_kind(records, encoding_problems),
        personal=_by_kind(records, lambda text: {each.kind for each in personal_data(text)}),
        conflicts=_conflicts(examples),
    )


def _tokens(examples: list[Example], tokenizer: Any) -> list[int]:
    texts = [each.whole for each in examples]
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [len(ids) for ids in found]


def _loading(config: DatasetConfig, tokenizer: Any) -> list[str]:
    try:
        return load_dataset_splits(config, tokenizer=tokenizer).report.lines()
    except GemmateError as error:  # too few rows to split, say: that is for the report, too
        return [str(error)]


def _relevance(examples: list[Example], task: DatasetConfig) -> Relevance:
    from sklearn.feature_extraction.text import TfidfVectorizer

    wanted = [redact(each.text) for each in read_examples(task)[2]]
    own = {word for each in examples for word in normalise(each.text).split()}
    counts = Counter(word for text in wanted for word in normalise(text).split())
    covered = sum(count for word, count in counts.items() if word in own)
    missing = [word for word, _ in counts.most_common() if word not in own][:10]
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    theirs = vectorizer.fit_transform(wanted)
    centre = np.asarray(theirs.mean(axis=0)).ravel()
    least = np.quantile(theirs @ centre, 0.05)
    near = vectorizer.transform([each.text for each in examples]) @ centre
    far = [each.row for each, value in zip(examples, near, strict=True) if value < least]
    share = covered / max(1, counts.total())
    return Relevance(Path(task.train or task.id).name, share, tuple(missing), tuple(far))


def _topics(texts: list[str]) -> list[Topic]:
    """Cluster the texts by their words, the largest first; none where they have no words."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [redact(text) for text in texts]  # these words are printed
    vectorizer = TfidfVectorizer(stop_words="english", max_features=2_000, sublinear_tf=True)
    try:
        vectors = vectorizer.fit_transform(texts)
    except ValueError:  # nothing but stop words
        return []
    number = min(TOPICS, max(1, len(texts) // 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different texts than topics
        found = KMeans(number, random_state=0, n_init=3).fit(vectors)
    words, sizes = vectorizer.get_feature_names_out(), np.bincount(found.labels_, minlength=number)
    order = np.argsort(-sizes, kind="stable")
    best = np.argsort(-found.cluster_centers_, axis=1, kind="stable")[:, :5]
    return [Topic(tuple(words[best[i]].tolist()), int(sizes[i])) for i in order if sizes[i]]


def _balance(examples: list[Example]) -> dict[str, int]:
    """Rows by class; empty where the answers are no classes but texts."""
    counts = Counter(each.label for each in examples if each.label is not None)
    many = len(counts) > CLASSES and 5 * len(counts) > len(examples)
    return {} if many else dict(counts.most_common())


def _by_kind(records: Sequence[Mapping[str, Any]], kinds: Any) -> dict[str, list[int]]:
    """Kind -> the rows that have it in any field, whether the form uses it or not."""
    found: dict[str, list[int]] = defaultdict(list)
    for row, record in enumerate(records):
        for kind in sorted({kind for text in _strings(record) for kind in kinds(text)}):
            found[kind].append(row)
    return dict(sorted(found.items()))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)


def _conflicts(examples: list[Example]) -> list[tuple[int, ...]]:
    asked: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for each in examples:
        if each.asked.strip():
            asked[normalise(f"{each.asked}\n{each.context}")][normalise(each.answered)].append(
                each.row
            )
    several = [answers.values() for answers in asked.values() if len(answers) > 1]
    return sorted(tuple(sorted(row for rows in answers for row in rows)) for answers in several)
