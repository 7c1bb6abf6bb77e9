"""Generated texts against references: BLEU, chrF, ROUGE, and how similar they are.

Row by row: a prediction, and its reference or a list of references, of which any one will do.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gemmate_lib.config import GemmateError
from gemmate_lib.stats import Interval, bootstrap

References = Sequence[str | Sequence[str]]
ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class TextScore:
    """A score with its 95 % interval over rows, one for each row, and how it was computed.

    interval: for BLEU and chrF the score of the whole corpus, which is not the mean of its rows'.
    signature: two scores may be compared where theirs are equal.
    """

    interval: Interval
    per_row: list[float]
    signature: str


def bleu(predictions: Sequence[str], references: References, *, seed: int = 0) -> TextScore:
    """Return corpus BLEU in 0..100; the rows' are sentence BLEU with effective order.

    A corpus in which no text has four words has no 4-gram, and so scores 0 even where it is right.
    Raises: GemmateError where there are no rows, or a row is no text with its references.
    Papineni et al. 2002, https://aclanthology.org/P02-1040; tokens and signature as in
    Post 2018, https://aclanthology.org/W18-6319
    """
    from sacrebleu.metrics import BLEU

    return _corpus_score(BLEU(), BLEU(effective_order=True), predictions, references, seed=seed)


def chrf(predictions: Sequence[str], references: References, *, seed: int = 0) -> TextScore:
    """Return corpus chrF2 in 0..100: F2 of character 1- to 6-grams, without white space.

    Raises: GemmateError where there are no rows, or a row is no text with its references.
    Popović 2015, https://aclanthology.org/W15-3049
    """
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    return _corpus_score(metric, metric, predictions, references, seed=seed)


def _corpus_score(
    metric: Any, of_rows: Any, predictions: Sequence[str], references: References, *, seed: int
) -> TextScore:
    """Count each text once; a resampled corpus is a sum of counts, scored by sacrebleu itself."""
    texts, lists = _checked(predictions, references)
    streams = itertools.zip_longest(*lists)  # sacrebleu wants the first of every row, the second...
    counts = np.array(metric._extract_corpus_statistics(texts, list(streams)))  # int64 [N, counts]

    def score(sums: np.ndarray) -> float:
        return metric._compute_score_from_stats(sums.tolist()).score

    def of_corpus(drawn: np.ndarray, axis: int = -1) -> Any:
        rows = drawn.astype(int)
        # Column by column: all at once would take as many times the memory.
        sums = np.stack([column[rows].sum(axis) for column in counts.T], axis=-1)
        return np.apply_along_axis(score, -1, sums)

    interval = bootstrap(np.arange(len(counts)), of_corpus, seed=seed)
    per_row = [of_rows._compute_score_from_stats(row).score for row in counts.tolist()]
    return TextScore(interval, per_row, str(metric.get_signature()))


def rouge(
    predictions: Sequence[str], references: References, *, stemmer: bool = False, seed: int = 0
) -> dict[str, TextScore]:
    """Return the mean F1 of rouge1, rouge2 and rougeL, in 0..1; of several references the best.

    Its words are runs of a-z and 0-9 in lower case: a text in another script has none, and gets 0.
    stemmer: Porter's, for English: "walks" is then "walked".
    Raises: GemmateError where there are no rows, or a row is no text with its references.
    Lin 2004, https://aclanthology.org/W04-1013
    """
    from rouge_score.rouge_scorer import RougeScorer

    texts, lists = _checked(predictions, references)
    scorer = RougeScorer(list(ROUGE), use_stemmer=stemmer)
    found = [scorer.score_multi(refs, text) for text, refs in zip(texts, lists, strict=True)]
    how = f"nrefs:{_number(lists)}|f:1|stem:{'yes' if stemmer else 'no'}"
    how += f"|rouge_score:{version('rouge_score')}"
    scores = {}
    for name in ROUGE:
        per_row = [float(row[name].fmeasure) for row in found]
        scores[name] = TextScore(bootstrap(per_row, seed=seed), per_row, f"{name}|{how}")
    return scores


def similarity(
    predictions: Sequence[str], references: References, *, model: str | None = None, seed: int = 0
) -> TextScore:
    """Return the mean cosine of each prediction and its closest reference; a blank text gets 0.

    model: of sentence-transformers, a name on the Hub or a folder: similar in meaning, -1..1.
        Without one, TF-IDF of characters: similar in spelling, 0..1. Its weights come from these
        very texts, so with other predictions a row that stayed the same may score a little less.
    Raises: GemmateError for rows that are no texts, or a model that was named and cannot be had.
    Reimers and Gurevych 2019, https://aclanthology.org/D19-1410
    """
    texts, lists = _checked(predictions, references)
    every = [*texts, *itertools.chain(*lists)]
    vectors, how = _tfidf(every) if model is None else _embeddings(every, model)
    owner = np.repeat(np.arange(len(texts)), [len(refs) for refs in lists])
    cosines = (vectors[: len(texts)][owner] * vectors[len(texts) :]).sum(axis=1)
    best = np.full(len(texts), -1.0)
    np.maximum.at(best, owner, np.minimum(cosines, 1.0))  # rounding leaves 1.0000000000000002
    return TextScore(bootstrap(best, seed=seed), best.tolist(), f"nrefs:{_number(lists)}|{how}")


def _tfidf(texts: list[str]) -> tuple[Any, str]:
    """Return unit rows, sparse [texts, n-grams], and how they were made."""
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(text.strip() for text in texts):
        raise GemmateError("All predictions and references are blank. Check the column's name.")
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
    # Of an array, unlike a matrix, * is taken element by element, as of NumPy's.
    vectors = csr_array(vectorizer.fit_transform(texts))
    return vectors, f"tfidf|case:lc|nc:2-4 in words|scikit-learn:{version('scikit-learn')}"


def _embeddings(texts: list[str], model: str) -> tuple[np.ndarray, str]:
    """Return unit rows [texts, D], and how they were made; no code that comes with it is run."""
    try:
        import sentence_transformers as st
    except ImportError:
        problem = f"{model} needs the package sentence-transformers"
        remedy = "Run `pip install sentence-transformers`, or leave model out for TF-IDF."
        raise GemmateError(f"{problem}. {remedy}") from None
    _refuse_own_code(model)
    safe = {"trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
    try:
        encoder = st.SentenceTransformer(model, **safe)
    except (OSError, ValueError, ImportError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        remedy = "Check its name and the network, or leave model out for TF-IDF."
        raise GemmateError(f"cannot load {model}: {why}. {remedy}") from error
    vectors = np.asarray(encoder.encode(texts, show_progress_bar=False), dtype=np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    blank = np.array([[not text.strip()] for text in texts])  # a model embeds these too, anyhow
    vectors = np.where(blank, 0.0, vectors / np.where(lengths > 0, lengths, 1.0))
    return vectors, f"{model}|sentence-transformers:{st.__version__}"


def _refuse_own_code(model: str) -> None:
    """Raise GemmateError for a folder whose modules are its own.

    sentence-transformers 3.4 to 5 runs those of a local folder, trust_remote_code or not; from 6
    on it refuses them itself, and this can go.
    """
    file = Path(model) / "modules.json"
    modules = json.loads(file.read_text("utf-8")) if file.is_file() else []
    for kind in [str(module.get("type")) for module in modules]:
        if not kind.startswith("sentence_transformers."):
            raise GemmateError(f"{model} runs code of its own ({kind}). Choose a plain model.")


def _checked(
    predictions: Sequence[str], references: References
) -> tuple[list[str], list[list[str]]]:
    """Return the texts and a list of references for each."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise GemmateError("A string is one row, not rows. Give lists, of one string perhaps.")
    if len(predictions) != len(references) or len(predictions) == 0:
        problem = f"There are {len(predictions)} predictions and {len(references)} references"
        raise GemmateError(f"{problem}. Give one or more rows, and each its reference.")
    lists: list[list[Any]] = [
        list(refs) if isinstance(refs, list | tuple) else [refs] for refs in references
    ]
    for row, (text, refs) in enumerate(zip(predictions, lists, strict=True)):
        if not refs or not all(isinstance(each, str) for each in [text, *refs]):
            raise GemmateError(f"Row {row} is no text with its references. Leave it out of both.")
    return list(predictions), lists


def _number(lists: list[list[str]]) -> int | str:
    """Return how many references each row has, in the words of sacrebleu's signature."""
    numbers = {len(refs) for refs in lists}
    return numbers.pop() if len(numbers) == 1 else "var"
