"""Duplicates against brute force, speed, and the seeded split."""

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmate_lib.splitting import carve, find_duplicates, normalise, prompt_keys, shingles

WORDS = st.sampled_from("abcd")
TEXTS = st.lists(st.lists(WORDS, max_size=14).map(" ".join), max_size=14)


def test_normalise():
    assert normalise("“Don’t  panic!”\n") == normalise("don't panic") == "don t panic"
    assert normalise("ﬁne ＡＢＣ") == "fine abc"
    assert normalise("watching,Love") == normalise("Watching love.")
    assert normalise("क्या है") != normalise("की है")
    assert normalise("?!") == "?!" != normalise("...")
    assert normalise("C++") != normalise("C")


def test_shingles():
    assert shingles("a b c d") == {"a b c", "b c d"}
    assert shingles("a b") == {"a b"} and shingles("") == {""}


def brute_force(texts, tenths):
    """The definition, pair by pair, in whole numbers."""
    kept, found, first = [], {}, {}
    for i, text in enumerate(texts):
        if normalise(text) in first:
            j = first[normalise(text)]
            found[i] = (found.get(j, (j,))[0], True)
            continue
        first[normalise(text)] = i
        own = shingles(normalise(text))
        for j in kept if tenths < 10 else []:
            other = shingles(normalise(texts[j]))
            if 10 * len(own & other) >= tenths * len(own | other):
                found[i] = (j, False)
                break
        else:
            kept.append(i)
    return found


@settings(max_examples=200, deadline=None)
@given(texts=TEXTS, tenths=st.integers(1, 10))
def test_prefix_filtering_finds_what_brute_force_finds(texts, tenths):
    assert find_duplicates(texts, threshold=tenths / 10) == brute_force(texts, tenths)


def test_long_texts_against_brute_force():
    rng = random.Random(0)
    texts = [" ".join(rng.choice("abcdefghijkl") for _ in range(40)) for _ in range(40)]
    for text in texts[:40]:
        words = text.split()
        for _ in range(rng.randint(1, 4)):
            words[rng.randrange(40)] = rng.choice("abcdefghijkl")
        texts.append(" ".join(words[: rng.randint(15, 40)]))
    for tenths in range(3, 10):
        found = find_duplicates(texts, threshold=tenths / 10)
        assert found == brute_force(texts, tenths)
    assert find_duplicates(texts, threshold=0.5)


def test_the_threshold_itself_counts():
    # 14 of 25 shingles shared, and 0.56 * 25 is 14.000000000000002
    words = [f"w{i:02}" for i in range(27)]
    long, short = " ".join(words), " ".join(words[11:])
    other = " ".join([*words[:16], *"abcde"])
    assert (len(shingles(long)), len(shingles(short)), len(shingles(other))) == (25, 14, 19)
    for texts in ([short, long], [long, short], [" ".join(words[:22]), other]):
        assert find_duplicates(texts, threshold=0.56) == {1: (0, False)}
        assert find_duplicates(texts, threshold=0.57) == {}


def test_an_exact_copy_of_a_near_copy_points_to_the_row_that_was_kept():
    texts = ["a b c d e f g h", "a b c d e f g h i", "A b c d e f g h, i!"]
    assert find_duplicates(texts, threshold=0.8) == {1: (0, False), 2: (0, True)}


VOCABULARY = [f"w{i}" for i in range(3_000)]
RANKS = list(itertools.accumulate(1 / (i + 1) for i in range(3_000)))


def prose(rng):
    return " ".join(rng.choices(VOCABULARY, cum_weights=RANKS, k=rng.randint(5, 60)))


def form_letter(rng):
    slots = [f"x{rng.randrange(10**6)}" for _ in range(2)]
    start = "Write a short answer to the question about {} in the light of {} and give a reason"
    return start.format(*slots)


@pytest.mark.parametrize(
    ("make", "threshold"), [(prose, 0.8), (form_letter, 0.8), (form_letter, 0.6)]
)
def test_ten_thousand_rows_take_less_than_two_seconds(make, threshold):
    rng = random.Random(0)
    texts = [make(rng) for _ in range(9_000)]
    texts += [text + " again" for text in rng.sample(texts, 1_000)]
    start = time.process_time()
    found = find_duplicates(texts, threshold=threshold)
    assert time.process_time() - start < 2
    assert len(found) >= 900


def test_shared_prompts_are_held_together_unless_they_are_a_fixed_instruction():
    keys = prompt_keys(["Why?", "why", "How?", ""] + ["Write a quote:"] * 5 + [""])
    assert keys[0] == keys[1] != keys[2]
    assert len(set(keys)) == len(keys) - 1


@settings(max_examples=100, deadline=None)
@given(keys=st.lists(st.sampled_from("abcdefghij"), max_size=40), seed=st.integers(0, 9))
def test_carving_loses_nothing_and_splits_no_key(keys, seed):
    rows = list(range(len(keys)))
    parts = carve(rows, keys, {"test": 0.1, "validation": 0.2})
    assert sorted(parts["train"] + parts["validation"] + parts["test"]) == rows
    owners = [{keys[row] for row in part} for part in parts.values()]
    assert sum(map(len, owners)) == len(set(keys))


def test_carving_sizes():
    rows = list(range(100))
    keys = [str(row) for row in rows]
    parts = carve(rows, keys, {"test": 0.1, "validation": 0.25})
    assert {split: len(part) for split, part in parts.items()} == {
        "test": 10,
        "validation": 25,
        "train": 65,
    }
    assert carve(rows, keys, {"test": 0.0}) == {"test": [], "train": rows}
