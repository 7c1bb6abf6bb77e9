"""Scores of texts agree with the formulas, worked out here by another road."""

import math
import sys
from collections import Counter
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmate_lib import texts
from gemmate_lib.config import GemmateError
from gemmate_lib.stats import Interval
from gemmate_lib.texts import bleu, chrf, rouge, similarity

# Lower case words and single spaces: every tokenizer cuts them alike.
WRITTEN = [
    "the cat sat on the mat and slept",
    "a dog ran over the green hill",
    "it rains in the north today and in the south",
    "tea is more than warm water",
]
TRUE = [
    "the cat sat on the mat and purred all night",
    "a dog ran over the hill in the rain",
    "it rains in the north today",
    "tea is more than warm water",
]
ALL = (bleu, chrf, lambda *rows: rouge(*rows)["rougeL"], similarity)
cheap = settings(
    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def no_bootstrap(values, statistic=np.mean, *, seed=0):
    return Interval(float(statistic(np.asarray(values, dtype=float))), 0, 0, len(values))


quick = patch.object(texts, "bootstrap", no_bootstrap)


def grams(items, n):
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu_by_formula(written, true, orders):
    """Papineni et al.: brevity penalty times the geometric mean of the clipped precisions."""
    pairs = [(a.split(), b.split()) for a, b in zip(written, true, strict=True)]
    logs = []
    for n in range(1, orders + 1):
        right = sum((grams(a, n) & grams(b, n)).total() for a, b in pairs)
        logs.append(math.log(right / sum(grams(a, n).total() for a, _ in pairs)))
    length, wanted = sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)
    return 100 * min(1, math.exp(1 - wanted / length)) * math.exp(sum(logs) / orders)


def chrf_by_formula(written, true):
    """Popović: F2 of the mean precision and recall of the orders that both sides have."""
    pairs = [(a.replace(" ", ""), b.replace(" ", "")) for a, b in zip(written, true, strict=True)]
    precisions, recalls = [], []
    for n in range(1, 7):
        # Of a row whose reference is too short for any, nothing is counted against it.
        own = sum(grams(a, n).total() for a, b in pairs if len(b) >= n)
        wanted = sum(grams(b, n).total() for _, b in pairs)
        shared = sum((grams(a, n) & grams(b, n)).total() for a, b in pairs)
        if own and wanted:
            precisions.append(shared / own)
            recalls.append(shared / wanted)
    if not sum(precisions):
        return 0.0
    precision, recall = np.mean(precisions), np.mean(recalls)
    return 100 * 5 * precision * recall / (4 * precision + recall)


def test_bleu_is_its_formula():
    found = bleu(WRITTEN, TRUE)
    assert found.interval.value == pytest.approx(bleu_by_formula(WRITTEN, TRUE, 4))
    rows = [bleu_by_formula([a], [b], 4) for a, b in zip(WRITTEN, TRUE, strict=True)]
    assert found.per_row == pytest.approx(rows)
    assert found.interval.low < found.interval.value < found.interval.high
    assert found.interval.value != pytest.approx(np.mean(rows), abs=1)  # not the mean of its rows
    assert found.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")


def test_only_a_row_takes_the_orders_it_has():
    """A corpus of three words has no 4-gram; a row of them has three orders."""
    found = bleu(["warm green tea", "cold tea"], ["warm green tea", "warm tea"])
    assert found.interval.value == 0
    assert found.per_row[0] == pytest.approx(100)
    halved = 100 * math.exp((math.log(1 / 2) + math.log(1 / 2 / 1)) / 2)  # NIST: no bigram, half
    assert found.per_row[1] == pytest.approx(halved)


def test_several_references_are_scored_as_by_sacrebleus_own_front():
    """And of an unequal number. It holds the private methods that give the counts of a row."""
    from sacrebleu.metrics import BLEU, CHRF

    several = [[TRUE[0], WRITTEN[0]], TRUE[1], [TRUE[2], "it snows", "no"], (TRUE[3],)]
    lists = [[each] if isinstance(each, str) else list(each) for each in several]
    columns = [[refs[i] if i < len(refs) else None for refs in lists] for i in range(3)]
    for ours, metric, rows in ((bleu, BLEU(), BLEU(effective_order=True)), (chrf, CHRF(), CHRF())):
        found = ours(WRITTEN, several)
        assert found.interval.value == pytest.approx(metric.corpus_score(WRITTEN, columns).score)
        scores = [rows.sentence_score(a, b).score for a, b in zip(WRITTEN, lists, strict=True)]
        assert found.per_row == pytest.approx(scores)
        assert found.signature == str(metric.get_signature()) and "nrefs:var" in found.signature


@pytest.mark.parametrize(("score", "formula"), [(bleu, bleu_by_formula), (chrf, chrf_by_formula)])
def test_a_resample_is_a_corpus(score, formula):
    """What the bootstrap is given is the score of the rows drawn, as if they had been written."""
    with patch.object(texts, "bootstrap", side_effect=no_bootstrap) as asked:
        score(WRITTEN, TRUE, seed=7)
    statistic = asked.call_args.args[1]
    drawn = np.array([[0, 0, 1, 3], [2, 1, 2, 3]])
    found = statistic(drawn.astype(float), axis=-1)
    more = () if score is chrf else (4,)
    expected = [formula([WRITTEN[i] for i in d], [TRUE[i] for i in d], *more) for d in drawn]
    assert found == pytest.approx(expected)
    assert asked.call_args.kwargs == {"seed": 7}


def test_chrf_is_its_formula():
    found = chrf(WRITTEN, TRUE)
    assert found.interval.value == pytest.approx(chrf_by_formula(WRITTEN, TRUE))
    # "ab" and "abc": precisions 2/2, 1/1; recalls 2/3, 1/2; 5 P R / (4 P + R) of their means.
    assert chrf(["ab"], ["abc"]).per_row == pytest.approx([100 * 5 * 7 / 12 / (4 + 7 / 12)])
    assert "nc:6|nw:0|space:no" in found.signature


@settings(cheap, max_examples=30)
@given(
    pairs=st.lists(st.tuples(st.text("ab ", max_size=9), st.text("ab ", max_size=9)), min_size=1)
)
@quick
def test_chrf_is_its_formula_on_short_strings(pairs):
    found = chrf(*zip(*pairs, strict=True))
    assert found.interval.value == pytest.approx(chrf_by_formula(*zip(*pairs, strict=True)))


def longest_common(a, b):
    """By trying: the longest subsequence of the shorter that is one of the other."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


def f1(shared, own, wanted):
    return 2 * shared / (own + wanted) if own + wanted else 0.0


few_words = st.lists(st.sampled_from("abc"), max_size=5)


@settings(cheap, max_examples=30)
@given(rows=st.lists(st.tuples(few_words, few_words), min_size=1, max_size=4))
@quick
def test_rouge_is_its_definition(rows):
    found = rouge([" ".join(a) for a, _ in rows], [" ".join(b) for _, b in rows])
    assert list(found) == ["rouge1", "rouge2", "rougeL"]
    for n in (1, 2):
        parts = [(grams(a, n), grams(b, n)) for a, b in rows]
        shares = [f1((a & b).total(), a.total(), b.total()) for a, b in parts]
        assert found[f"rouge{n}"].per_row == pytest.approx(shares)
    shares = [f1(longest_common(a, b), len(a), len(b)) for a, b in rows]
    assert found["rougeL"].per_row == pytest.approx(shares)
    assert found["rougeL"].interval.value == pytest.approx(np.mean(shares))


def test_rouge_takes_the_best_reference_of_each_row():
    found = rouge(["a b c", "x"], [["c b a", "a b d", "z"], "y"])
    assert found["rouge1"].per_row == pytest.approx([1.0, 0.0])
    assert found["rougeL"].per_row == pytest.approx([2 / 3, 0.0])  # of the second
    assert found["rougeL"].signature.startswith("rougeL|nrefs:var|f:1|stem:no|rouge_score:0.1")


def test_rouge_stems_only_where_asked():
    assert rouge(["she walked"], ["she walks"])["rouge1"].per_row == pytest.approx([0.5])
    stemmed = rouge(["she walked"], ["she walks"], stemmer=True)["rouge1"]
    assert stemmed.per_row == pytest.approx([1.0]) and "stem:yes" in stemmed.signature


def tfidf_cosine(a, b, every):
    """Characters in words with a space at each end; log((1 + texts) / (1 + with it)) + 1."""

    def count(text):
        words = [f" {word} " for word in text.lower().split()]
        return Counter("".join(g) for w in words for n in (2, 3, 4) for g in grams(w, n).elements())

    held = Counter(gram for text in every for gram in count(text))
    weight = {gram: math.log((1 + len(every)) / (1 + n)) + 1 for gram, n in held.items()}
    first, second = ({g: n * weight[g] for g, n in count(text).items()} for text in (a, b))
    dot = sum(value * second.get(gram, 0) for gram, value in first.items())
    return dot / math.hypot(*first.values()) / math.hypot(*second.values())


def test_similarity_is_tf_idf_where_no_model_is_named():
    several = [[TRUE[1], TRUE[0]], *TRUE[1:]]
    every = [*WRITTEN, TRUE[1], *TRUE]
    found = similarity(WRITTEN, several)
    cosines = [tfidf_cosine(a, b, every) for a, b in zip(WRITTEN, TRUE, strict=True)]
    assert found.per_row == pytest.approx(cosines)
    assert found.interval.value == pytest.approx(np.mean(cosines))
    assert found.signature.startswith("nrefs:var|tfidf|case:lc|nc:2-4 in words|scikit-learn:1.")
    assert similarity(["", "a"], ["a", "b"]).per_row[0] == 0


@pytest.fixture
def stand_in(monkeypatch):
    """A module in the place of sentence-transformers, which is not installed here.

    It holds how the package is called, and what is made of its vectors: nothing of its models.
    """
    module, calls = ModuleType("sentence_transformers"), []

    class SentenceTransformer:
        def __init__(self, name, *, trust_remote_code, model_kwargs):
            calls.append((name, trust_remote_code, model_kwargs))
            if name == "no/such-model":
                raise OSError("no/such-model is not a local folder:\nand is not on the Hub")

        def encode(self, sentences, *, show_progress_bar):
            assert not show_progress_bar
            return np.array(
                [[3.0 * max(len(s), 1), 4.0 * s.count("a")] for s in sentences], np.float32
            )

    module.SentenceTransformer, module.__version__ = SentenceTransformer, "0.0"
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return calls


def test_similarity_by_a_model_is_the_cosine_of_its_vectors(stand_in):
    found = similarity(["aa", "b", ""], [["b", "aaa"], "a", "a"], model="some/model")
    assert found.per_row == pytest.approx([1.0, 3 / 5, 0.0])  # (3, 4) and (1, 0); a blank text
    assert found.signature == "nrefs:var|some/model|sentence-transformers:0.0"
    assert stand_in == [("some/model", False, {"use_safetensors": True})]


def test_a_model_that_was_named_is_not_replaced(stand_in, monkeypatch):
    with pytest.raises(GemmateError, match=r"cannot load no/such-model: .* folder\. Check"):
        similarity(["a"], ["b"], model="no/such-model")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    with pytest.raises(GemmateError, match="pip install sentence-transformers"):
        similarity(["a"], ["b"], model="some/model")


def test_a_folder_with_code_of_its_own_is_refused(stand_in, tmp_path):
    modules = tmp_path / "modules.json"
    modules.write_text('[{"type": "sentence_transformers.models.Pooling"}]')
    similarity(["a"], ["b"], model=str(tmp_path))
    modules.write_text('[{"type": "sentence_transformers.models.Pooling"}, {"type": "own.Layer"}]')
    with pytest.raises(GemmateError, match=r"own\.Layer"):
        similarity(["a"], ["b"], model=str(tmp_path))
    assert len(stand_in) == 1


@pytest.mark.parametrize("score", ALL)
def test_rows_that_cannot_be_scored_are_refused(score):
    for rows in (([], []), (["a"], ["a", "b"]), (["a", "b"], ["a"])):
        with pytest.raises(GemmateError, match="each its reference"):
            score(*rows)
    for rows in ((["a", None], ["a", "b"]), (["a", "b"], ["a", []]), (["a", "b"], ["a", [None]])):
        with pytest.raises(GemmateError, match="Row 1"):
            score(*rows)
    with pytest.raises(GemmateError, match="Row 0"):
        score(["a"], [math.nan])  # an empty cell of a table
    for rows in (("ab", ["a", "b"]), (["a", "b"], "ab")):
        with pytest.raises(GemmateError, match="A string is one row"):
            score(*rows)


def test_nothing_but_blank_texts():
    assert bleu([""], [""]).per_row == chrf([""], [""]).per_row == [0.0]
    assert rouge([""], [" "])["rouge1"].per_row == [0.0]
    with pytest.raises(GemmateError, match="blank"):
        similarity([" "], [""])


@pytest.mark.parametrize("score", ALL)
def test_the_seed_decides_and_one_row_bounds_nothing(score):
    two = WRITTEN[:2], TRUE[:2]
    assert score(*two) == score(*two)
    assert score(WRITTEN[:1], TRUE[:1]).interval.high == math.inf
    same = score(TRUE, TRUE).interval
    assert (same.value, same.low) == (pytest.approx(same.high), pytest.approx(same.high))


sentences = st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=1, max_size=5)


@cheap
@given(rows=sentences, data=st.data())
@quick
def test_the_order_of_the_rows_changes_nothing(rows, data):
    others = data.draw(st.permutations(rows))
    order = data.draw(st.permutations(range(len(rows))))
    for score in ALL:
        found = score(rows, others)
        again = score([rows[i] for i in order], [others[i] for i in order])
        assert again.interval.value == pytest.approx(found.interval.value)
        assert again.per_row == pytest.approx([found.per_row[i] for i in order])


@cheap
@given(rows=st.lists(st.lists(st.sampled_from("abc"), min_size=6), min_size=1).map(list))
@quick
def test_a_perfect_prediction_has_the_highest_score(rows):
    rows = [" ".join(words) for words in rows]
    for score, best in zip(ALL, (100, 100, 1, 1), strict=True):
        found = score(rows, rows)
        assert found.interval.value == pytest.approx(best)
        assert found.per_row == pytest.approx([best] * len(rows))
        assert max(found.per_row) <= best + 1e-9
