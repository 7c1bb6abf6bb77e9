"""SQuAD v2 against a second computation by another road, hand-worked cases, and real questions."""

import functools
import itertools
import json
import operator
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmate_lib.config import GemmateError
from gemmate_lib.squad import exact, f1, normalize_answer, read_squad, score, tokens_of
from gemmate_lib.stats import wilson

EXACTLY = {"abs": 1e-9, "rel": 0}
ASCII_MARKS = {chr(i) for i in range(33, 127) if not chr(i).isalnum()}
REAL = "squad_v2_cs224n_dev.json"
cheap = settings(max_examples=150, deadline=None, database=None)


# The second computation: runs of characters for the regular expression, sorted lists for the
# bags of words, one sum per threshold for the running total.
def words(text):
    kept = "".join(c for c in text.lower() if c not in ASCII_MARKS)
    runs = ["".join(run) for _, run in itertools.groupby(kept, str.isalnum)]
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def overlap(one, other):
    one, other, shared = sorted(one), sorted(other), 0
    if not one or not other:
        return float(one == other)
    total = len(one) + len(other)
    while one and other:
        if one[-1] == other[-1]:
            shared += 1
            one.pop(), other.pop()
        else:
            (one if one[-1] > other[-1] else other).pop()
    return 2 * shared / total


def raw_row(prediction, golds):
    """Exact and F1 of a row, before any threshold."""
    own, bags = words(prediction), [words(gold) for gold in golds if words(gold)] or [[]]
    return float(own in bags), max(overlap(own, bag) for bag in bags)


def expected(predictions, golds, no_answer=None, threshold=1.0):
    """Exact and F1 of each row, and the averages in percent, as the official script has them."""
    rows = []
    for key, own in golds.items():
        silent = no_answer is not None and no_answer[key] > threshold
        empty = not len(own)
        rows.append((float(empty),) * 2 if silent else raw_row(predictions[key], own))
    parts = {"": lambda own: True, "HasAns_": len, "NoAns_": lambda own: not len(own)}
    totals = {}
    for part, belongs in parts.items():
        if mine := [row for row, own in zip(rows, golds.values(), strict=True) if belongs(own)]:
            for name, column in zip(("exact", "f1"), zip(*mine, strict=True), strict=True):
                totals[part + name] = 100 * sum(column) / len(mine)
            totals[part + "total"] = len(mine)
    return rows, totals


def best_of(predictions, golds, no_answer, row_scores):
    """Try every number of kept predictions; on a tie, the fewest."""
    keys, worth = [key for _, key in sorted_pairs(no_answer)], []
    for key in keys:
        worth.append(row_scores[key] if len(golds[key]) else (-1 if predictions[key] else 0))
    empty = sum(not len(own) for own in golds.values())
    totals = [functools.reduce(operator.add, worth[:k], empty) for k in range(len(keys) + 1)]
    kept = totals.index(max(totals))
    return 100 * max(totals) / len(keys), no_answer[keys[kept - 1]] if kept else 0.0


def sorted_pairs(no_answer):
    pairs = [(value, place, key) for place, (key, value) in enumerate(no_answer.items())]
    return [(value, key) for value, _, key in sorted(pairs)]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat,\n sat!", "cat sat"),
        ("an apple a day", "apple day"),
        ("Theatre another", "theatre another"),
        ("a.n. other's", "others"),  # punctuation first, and nothing in its place
        ("a-b the-b", "ab theb"),
        ("$1,000.50", "100050"),
        ("“the” – a…", "“ ” – …"),  # only ASCII punctuation goes, and it bounds words
        ("the_a", "thea"),
        ("ÉCOLE the école", "école école"),
        ("àa théa", "àa théa"),
        ("東京 The", "東京"),
        ("a\u00a0the\u2003x", "x"),
        (" The ... a ", ""),
        ("", ""),
    ],
)
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal
    assert tokens_of(text) == normal.split() == words(text)


@pytest.mark.parametrize(
    ("prediction", "golds", "right", "shared"),
    [
        ("the Cat.", ["cat"], 1, 1),
        ("cat sat", ["cat"], 0, 2 / 3),
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),
        ("cat cat dog", ["cat cat"], 0, 4 / 5),  # as often as both have it
        ("dog", ["cat", "big dog", "a dog"], 1, 1),
        ("dog", ["cat", "big dog"], 0, 2 / 3),
        ("fish", ["cat", "dog"], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("the", [], 1, 1),  # normalises to nothing, as officially
        ("cat", [], 0, 0),
        ("", ["the", "."], 1, 1),  # no gold is left
        ("cat", ["the"], 0, 0),
        ("", ["the", "cat"], 0, 0),  # the article is dropped, the cat is left
        ("cat", ["", "cat"], 1, 1),
        ("“cat”", ["cat"], 0, 0),
        ("sat the cat", ["cat sat"], 0, 1),  # a bag of words
    ],
)
def test_one_answer(prediction, golds, right, shared):
    assert exact(prediction, golds) == right
    assert f1(prediction, golds) == pytest.approx(shared, **EXACTLY)
    assert raw_row(prediction, golds) == pytest.approx((right, shared), **EXACTLY)


def test_one_text_is_no_list_of_golds():
    for function in (exact, f1):
        with pytest.raises(GemmateError, match="'Paris' are one text"):
            function("p", "Paris")


PIECES = ["a", "An", "the", "The.", "cat", "Cat", "cat!", "dog", "x-ray", "–", "“the”", ".", "İ"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=5).map(" ".join) | st.text(max_size=6)
GOLDS = st.lists(TEXTS, max_size=3)


@cheap
@given(TEXTS, GOLDS, st.randoms(use_true_random=False))
def test_one_answer_agrees_with_the_second_computation(prediction, golds, rng):
    assert tokens_of(prediction) == words(prediction)
    found = exact(prediction, golds), f1(prediction, golds)
    assert found == pytest.approx(raw_row(prediction, golds), **EXACTLY)
    more = golds * 2 + [" The", "."]  # duplicates and what normalises to nothing change nothing
    rng.shuffle(more)
    assert (exact(prediction, more), f1(prediction, more)) == found


PROBABILITIES = st.sampled_from([0.0, 0.1, 0.25, 0.25, 0.5, 0.9, 1.0])
ROWS = st.lists(st.tuples(TEXTS, GOLDS, PROBABILITIES), min_size=1, max_size=8)


def columns(rows):
    return tuple({f"q{i}": row[c] for i, row in enumerate(rows)} for c in range(3))


def shuffled(mapping, rng):
    return dict(rng.sample(list(mapping.items()), len(mapping)))


@cheap
@given(ROWS, PROBABILITIES, st.randoms(use_true_random=False))
def test_all_rows_agree_with_the_second_computation(rows, threshold, rng):
    predictions, golds, no_answer = columns(rows)
    no_answer = shuffled(no_answer, rng)  # its own order decides between equal ones
    found = score(predictions, golds, no_answer=no_answer, threshold=threshold)
    each, totals = expected(predictions, golds, no_answer, threshold)
    for mine, theirs in zip(zip(found.exact, found.f1, strict=True), each, strict=True):
        assert mine == pytest.approx(theirs, **EXACTLY)
    assert found.answerable == [bool(own) for own in golds.values()]
    official = found.official()
    assert {name: official[name] for name in totals} == pytest.approx(totals, **EXACTLY)
    assert len(official) == len(totals) + 4
    raw = score(predictions, golds)
    for name, own in (("exact", raw.exact), ("f1", raw.f1)):
        by_key = dict(zip(golds, own, strict=True))
        best = best_of(predictions, golds, no_answer, by_key)
        assert official[f"best_{name}"] == pytest.approx(best[0], **EXACTLY)
        assert official[f"best_{name}_thresh"] == best[1]
    moved = score(shuffled(predictions, rng), shuffled(golds, rng), no_answer=no_answer,
                  threshold=threshold)  # fmt: skip
    assert moved.official() == pytest.approx(official, **EXACTLY)


@cheap
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "cat", "big dog"]), st.sampled_from([[], ["cat"], ["dog"]])),
        min_size=1, max_size=7,
    ),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_best_threshold_is_the_best_of_all(rows, rng):
    """Where probabilities differ and are above 0, no threshold gives a better score."""
    places = rng.sample(range(1, len(rows) + 1), len(rows))
    triples = [(*row, place / 10) for row, place in zip(rows, places, strict=True)]
    predictions, golds, no_answer = columns(triples)
    found = score(predictions, golds, no_answer=no_answer).official()
    every = [0.0, *sorted(no_answer.values())]
    for name in ("exact", "f1"):
        reached = [
            score(predictions, golds, no_answer=no_answer, threshold=t).official()[name]
            for t in every
        ]
        assert found[f"best_{name}"] == pytest.approx(max(reached), **EXACTLY)
        chosen = every.index(found[f"best_{name}_thresh"])
        assert reached[chosen] == pytest.approx(max(reached), **EXACTLY)
        assert all(other < max(reached) - 1e-9 for other in reached[:chosen])


def test_official_names_order_and_percentages():
    predictions = {"a": "cat", "b": "big dog", "c": "", "d": "fish"}
    golds = {"a": ["The cat"], "b": ["dog"], "c": [], "d": []}
    assert list(score(predictions, golds).official().items()) == [
        ("exact", 50.0), ("f1", pytest.approx(100 * (1 + 2 / 3 + 1) / 4)), ("total", 4),
        ("HasAns_exact", 50.0), ("HasAns_f1", pytest.approx(250 / 3)), ("HasAns_total", 2),
        ("NoAns_exact", 50.0), ("NoAns_f1", 50.0), ("NoAns_total", 2),
    ]  # fmt: skip
    none = dict.fromkeys(golds, 0.5)
    named = list(score(predictions, golds, no_answer=none).official())
    assert named[9:] == ["best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"]
    assert list(score({"d": ""}, {"d": []}).official()) == [
        "exact", "f1", "total", "NoAns_exact", "NoAns_f1", "NoAns_total",
    ]  # fmt: skip
    assert "NoAns_total" not in score({"a": ""}, {"a": ["x"]}).official()


def test_the_threshold_empties_what_is_above_it_and_not_what_is_at_it():
    predictions = {"has": "cat", "none": "cat", "article": ""}
    golds = {"has": ["cat"], "none": [], "article": ["the"]}
    even = dict.fromkeys(golds, 0.5)
    assert score(predictions, golds, no_answer=even, threshold=0.5).exact == [1, 0, 1]
    above = score(predictions, golds, no_answer=even, threshold=0.4999)
    # A question is answerable where it has any gold: silence is then wrong, though "" is right.
    assert (above.exact, above.f1, above.answerable) == ([0, 1, 0], [0, 1, 0], [True, False, True])
    assert score(predictions, golds, no_answer=dict.fromkeys(golds, 1.0)).exact == [1, 0, 1]
    # The search looks at the predictions before the threshold, whatever it is.
    assert above.best == score(predictions, golds, no_answer=even).best != {}


def test_the_best_threshold_by_hand():
    predictions = {"a": "cat", "b": "cat", "c": "cat", "d": "", "e": "big cat"}
    golds = {"a": ["cat"], "b": [], "c": ["cat"], "d": [], "e": ["cat"]}
    no_answer = {"e": 0.5, "d": 0.4, "c": 0.3, "b": 0.2, "a": 0.1}
    # Kept one by one, exact: 2, 3, 2, 3, 3, 3; F1: 2, 3, 2, 3, 3, 3 2/3.
    found = score(predictions, golds, no_answer=no_answer).best
    assert (found["best_exact"], found["best_exact_thresh"]) == (60.0, 0.1)
    assert found["best_f1"] == pytest.approx(100 * (3 + 2 / 3) / 5)
    assert found["best_f1_thresh"] == 0.5


def test_equal_probabilities_are_taken_in_the_order_given():
    predictions, golds = {"has": "cat", "none": "cat"}, {"has": ["cat"], "none": []}
    first = score(predictions, golds, no_answer={"has": 0.5, "none": 0.5}).best
    assert (first["best_exact"], first["best_exact_thresh"]) == (100.0, 0.5)  # 1, 2, 1
    last = score(predictions, golds, no_answer={"none": 0.5, "has": 0.5}).best
    assert (last["best_exact"], last["best_exact_thresh"]) == (50.0, 0.0)  # 1, 0, 1


def test_keeping_nothing_has_threshold_zero():
    """Also where a prediction of "the" would be right: the search asks only whether it is ""."""
    found = score({"q": "the"}, {"q": []}, no_answer={"q": 0.3})
    assert found.official()["exact"] == 100.0
    assert found.best == dict.fromkeys(("best_exact", "best_f1"), 100.0) | dict.fromkeys(
        ("best_exact_thresh", "best_f1_thresh"), 0.0
    )
    both = score({"q": "the", "r": "x"}, {"q": [], "r": ["x"]}, no_answer={"q": 0.3, "r": 0.4})
    assert (both.official()["exact"], both.best["best_exact"]) == (100.0, 50.0)


def test_metrics_have_intervals_and_only_the_parts_there_are():
    golds = {f"q{i}": ["big cat"] if i % 3 else [] for i in range(60)}
    predictions = {key: ("cat", "big cat", "")[i % 7 % 3] for i, key in enumerate(golds)}
    found, official = score(predictions, golds), score(predictions, golds).official()
    intervals = found.metrics()
    names = [part + name for part in ("", "HasAns_", "NoAns_") for name in ("exact", "f1")]
    assert list(intervals) == names
    for name, interval in intervals.items():
        assert interval.value == pytest.approx(official[name] / 100, **EXACTLY)
        assert 0 <= interval.low < interval.value < interval.high <= 1
    assert [intervals[name].n for name in names] == [60, 60, 40, 40, 20, 20]
    assert intervals["exact"] == wilson(int(sum(found.exact)), 60)
    assert found.metrics() == intervals != found.metrics(seed=1)
    assert list(score({"q": ""}, {"q": []}).metrics()) == ["exact", "f1", "NoAns_exact", "NoAns_f1"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"golds": {}, "predictions": {}}, "no golds"),
        ({"predictions": {"a": ""}}, "predictions do not fit .* 1 ids missing, 0 surplus.*'b'"),
        ({"predictions": {"a": "", "b": "", "c": ""}}, "0 ids missing, 1 surplus.*'c'"),
        ({"predictions": {"a": "", "b": None}}, "prediction for 'b' is no text"),
        ({"no_answer": {"a": 0.0}}, "no-answer probabilities do not fit .* missing 'b'"),
        ({"no_answer": {}}, "2 ids missing"),
        ({"no_answer": {"a": 0.0, "b": 0.0, "c": 0.0}}, "surplus 'c'"),
        ({"no_answer": {"a": 0.0, "b": float("nan")}}, "NaN"),
        ({"no_answer": {"a": 0.0, "b": 0.0}, "threshold": float("nan")}, "NaN"),
        ({"golds": {"a": ["x"], "b": "Paris"}}, "one text"),
    ],
)
def test_what_cannot_be_scored(changed, told):
    usual = {"predictions": {"a": "", "b": ""}, "golds": {"a": [], "b": ["x"]}}
    arguments = usual | changed
    with pytest.raises(GemmateError, match=told):
        score(arguments.pop("predictions"), arguments.pop("golds"), **arguments)


CONTEXT = "Caf\u00e9 \U0001f408 cats sat."


def native(**changes):
    """A file of two questions; the changes are to the first."""
    first = {"id": "a", "question": "Who sat?", "is_impossible": False,
             "answers": [{"text": "cats", "answer_start": 7}]}  # fmt: skip
    second = {"id": "b", "question": "Who ran?", "is_impossible": True, "answers": [],
              "plausible_answers": [{"text": "cats", "answer_start": 7}]}  # fmt: skip
    paragraph = {"context": CONTEXT, "qas": [first | changes, second]}
    return {"version": "v2.0", "data": [{"title": "Cats", "paragraphs": [paragraph]}]}


def write(folder, content):
    path = folder / "squad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def test_a_native_file_becomes_records(tmp_path):
    records, misplaced = read_squad(write(tmp_path, native()))
    shared = {"title": "Cats", "context": CONTEXT}
    assert records == [
        {"id": "a", **shared, "question": "Who sat?",
         "answers": {"text": ["cats"], "answer_start": [7]}},
        {"id": "b", **shared, "question": "Who ran?", "answers": {"text": [], "answer_start": []}},
    ]  # fmt: skip
    assert list(records[0]) == ["id", "title", "context", "question", "answers"]
    assert misplaced == 0
    assert read_squad(str(write(tmp_path, "\ufeff" + json.dumps(native())))) == (records, 0)


def test_a_file_of_the_first_version(tmp_path):
    whole = native()
    for question in whole["data"][0]["paragraphs"][0]["qas"]:
        del question["is_impossible"]
    records, _ = read_squad(write(tmp_path, whole))
    assert [record["id"] for record in records] == ["a", "b"]


def test_misplaced_answers_are_kept_and_counted(tmp_path):
    starts = [7, 6, 8, -5, -9, 99]
    assert CONTEXT.startswith("cats", -9)  # a negative start must not count from the end
    answers = [{"text": "cats", "answer_start": start} for start in starts]
    records, misplaced = read_squad(write(tmp_path, native(answers=answers)))
    assert records[0]["answers"] == {"text": ["cats"] * 6, "answer_start": starts}
    assert misplaced == 5


def without(name):
    whole = native()
    del whole["data"][0]["paragraphs"][0]["qas"][0][name]
    return whole


HERE = r"data\[0\]\.paragraphs\[0\]\.qas\[0\]"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not JSON in UTF-8"),
        ([], "the file is no object"),
        ({"version": "v2.0"}, "the file lacks 'data'"),
        ({"data": {}}, "'data' of the file is of type dict, not list"),
        ({"data": []}, "holds no questions"),
        ({"data": ["x"]}, r"data\[0\] is no object"),
        ({"data": [{"title": "x"}]}, r"data\[0\] lacks 'paragraphs'"),
        ({"data": [{"paragraphs": []}]}, r"data\[0\] lacks 'title'"),
        ({"data": [{"title": "x", "paragraphs": [{}]}]}, r"paragraphs\[0\] lacks 'context'"),
        ({"data": [{"title": "", "paragraphs": [{"context": ""}]}]}, "lacks 'qas'"),
        (without("id"), HERE + " lacks 'id'"),
        (without("answers"), HERE + " lacks 'answers'"),
        (without("question"), HERE + " lacks 'question'"),
        (native(id=7), f"'id' of {HERE} is of type int, not str"),
        (native(id="b"), "the id 'b' more than once"),
        (native(answers={"text": []}), f"'answers' of {HERE} is of type dict, not list"),
        (native(answers=["cats"]), HERE + r"\.answers\[0\] is no object"),
        (native(answers=[{"answer_start": 7}]), HERE + r"\.answers\[0\] lacks 'text'"),
        (native(answers=[{"text": "cats"}]), r"answers\[0\] lacks 'answer_start'"),
        (native(answers=[{"text": "cats", "answer_start": True}]), "of type bool, not int"),
        (native(is_impossible="no"), f"'is_impossible' of {HERE} is of type str, not bool"),
        (native(is_impossible=True), HERE + " has answers, but is_impossible"),
    ],
)
def test_a_malformed_file_is_refused_and_the_place_named(tmp_path, content, told):
    path = write(tmp_path, content)
    with pytest.raises(GemmateError, match=told) as caught:
        read_squad(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(GemmateError, match="cannot be read"):
        read_squad(tmp_path / "gone.json")
    (tmp_path / "latin.json").write_bytes(b'{"data": "caf\xe9"}')
    with pytest.raises(GemmateError, match="not JSON in UTF-8"):
        read_squad(tmp_path / "latin.json")


@pytest.fixture(scope="module")
def questions(real):
    return read_squad(real(REAL))


def test_real_questions_are_read(questions, real):
    records, misplaced = questions
    empty = [record["id"] for record in records if not record["answers"]["text"]]
    assert (len(records), len(empty), misplaced) == (6078, 3168, 0)
    text = real(REAL).read_text("utf-8")
    assert len(empty) == text.count('"is_impossible":true')
    assert len(records) == text.count('"question":')


def perturbed(record, other, rng):
    """An answer near a gold one, or far from it."""
    golds = record["answers"]["text"]
    text = rng.choice(golds or other["answers"]["text"] or ["the cat"])
    items = text.split()
    items.pop(rng.randrange(len(items)))
    changes = [
        text, f"The {text}", f"“{text}”", f"({text.upper()}), ", "", " ".join(items),
        f"{text} and {text}", rng.choice(other["answers"]["text"] or ["an"]),
    ]  # fmt: skip
    return rng.choice(changes if golds else ["", *changes])


def test_real_questions_agree_with_the_second_computation(questions):
    records, rng = questions[0], random.Random(0)
    golds = {record["id"]: record["answers"]["text"] for record in records}
    predictions = {r["id"]: perturbed(r, rng.choice(records), rng) for r in records}
    no_answer = {key: round(rng.betavariate(1, 2 if own else 1), 3) for key, own in golds.items()}
    for threshold in (1.0, 0.6):
        found = score(predictions, golds, no_answer=no_answer, threshold=threshold)
        each, totals = expected(predictions, golds, no_answer, threshold)
        pairs = zip(found.exact, found.f1, each, strict=True)
        assert max(abs(e - x) + abs(f - y) for e, f, (x, y) in pairs) < 1e-9
        official = found.official()
        assert {name: official[name] for name in totals} == pytest.approx(totals, **EXACTLY)
        assert 20 < official["HasAns_exact"] < official["HasAns_f1"] - 5 < 90
        assert 5 < official["NoAns_exact"] < 95
    for name, column in (("exact", 0), ("f1", 1)):
        rows = {key: raw_row(predictions[key], own)[column] for key, own in golds.items()}
        met = list(running_totals(predictions, golds, no_answer, rows))
        highest = 100 * max(total for _, total in met) / len(rows)
        assert official[f"best_{name}"] == pytest.approx(highest, **EXACTLY)
        chosen = official[f"best_{name}_thresh"]
        reached = [100 * total / len(rows) for value, total in met if value == chosen]
        assert chosen > 0 and max(reached) == pytest.approx(highest, **EXACTLY)


def running_totals(predictions, golds, no_answer, rows):
    """Yield the probability up to which predictions are kept, and the score."""
    total = sum(not own for own in golds.values())
    yield 0.0, total
    for value, key in sorted_pairs(no_answer):
        total += rows[key] if golds[key] else -(predictions[key] != "")
        yield value, total


def test_real_golds_are_right_and_have_intervals(questions):
    golds = {record["id"]: record["answers"]["text"] for record in questions[0]}
    found = score({key: own[-1] if own else "" for key, own in golds.items()}, golds)
    wrong = [key for key, right in zip(golds, found.exact, strict=True) if not right]
    assert [golds[key][-1] for key in wrong] == ["."]  # no gold, officially, beside others
    half = score({key: own[0] if own else "x" for key, own in golds.items()}, golds)
    intervals = half.metrics()
    assert intervals["exact"].low < 2910 / 6078 == intervals["exact"].value
    assert intervals["NoAns_f1"].value == 0.0 and intervals["HasAns_f1"].value == 1.0
