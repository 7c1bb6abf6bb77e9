"""Cards are documentation and check at once: each field is enforced, each shipped card is true."""

import hashlib
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest

from gemmate_lib.cards import card_checksum, card_paths, read_card, verify
from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import load_dataset_splits

CARD = """---
pretty_name: Toy
license: mit
language: [en]
source:
  file: toy.jsonl
format: quotes
splits:
  train: 2
features:
  quote: string
  author: string
  tags: list[string]
sha256: null
defects: []
---
# Toy
"""
ROWS = [{"quote": "Q", "author": "A", "tags": ["x"]}, {"quote": "R", "author": "B", "tags": []}]


def card_with(tmp_path, old="", new=""):
    assert old in CARD
    path = tmp_path / "toy.md"
    path.write_text(CARD.replace(old, new, 1) if old else CARD)
    return read_card(path)


def test_a_card_accepts_its_own_data(tmp_path):
    verify(card_with(tmp_path), ROWS)
    verify(card_with(tmp_path, "sha256: null", f"sha256: {card_checksum(ROWS)}"), ROWS)


def test_the_checksum_is_of_canonical_json_lines():
    line = '{"a": 1, "b": "é"}\n'.encode()
    assert card_checksum([{"b": "é", "a": 1}]) == hashlib.sha256(line).hexdigest()
    assert card_checksum(ROWS) != card_checksum(ROWS[::-1])


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (ROWS[:1], r"splits\.train: expected 2, found 1"),
        ([ROWS[0], {"quote": "R", "author": "B"}], "features of row 1"),
        ([ROWS[0], ROWS[1] | {"year": 1}], "features of row 1"),
        ([ROWS[0], ROWS[1] | {"author": None}], r"author of row 1: expected string, found None"),
        ([ROWS[0], ROWS[1] | {"tags": "x"}], r"tags of row 1: expected list\[string\], found str"),
        ([ROWS[0], ROWS[1] | {"tags": ["x", 1]}], r"found list\[int\|string\]"),
    ],
)
def test_other_data_is_refused_by_field(tmp_path, rows, told):
    with pytest.raises(GemmateError, match=told):
        verify(card_with(tmp_path), rows)


def test_one_changed_letter_is_refused(tmp_path):
    card = card_with(tmp_path, "sha256: null", f"sha256: {card_checksum(ROWS)}")
    with pytest.raises(GemmateError, match="toy does not match its card: sha256: expected"):
        verify(card, [ROWS[0], ROWS[1] | {"quote": "S"}])


def test_a_split_the_card_does_not_know_is_refused(tmp_path):
    with pytest.raises(GemmateError, match=r"splits\.test: expected None"):
        verify(card_with(tmp_path), ROWS, split="test")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("sha256: null", "sha265: null", "sha256: Field required"),
        ("sha256: null", "sha256: abc", "sha256: String should match"),
        ("defects: []", "defects: []\nlicence: mit", "licence: Extra inputs"),
        ("  file: toy.jsonl", "  hub_id: a/b\n  file: toy.jsonl", "give one of"),
        ("  file: toy.jsonl", "  seed: 1", "give one of"),
        ("  file: toy.jsonl", "  generator: os:getcwd", "generator: String should match"),
        ("  file: toy.jsonl", "  hub_id: a/b\n  revision: main", "revision: String should match"),
        ("splits:\n  train: 2", "splits:\n  train: many", r"splits\.train"),
        ("defects: []", "defects: [", "malformed YAML"),
        ("---\n", "", "no front matter"),
        ("---\n# Toy", "# Toy", "no front matter"),
    ],
)
def test_a_wrong_card_is_refused_by_field(tmp_path, old, new, told):
    with pytest.raises(GemmateError, match=told):
        card_with(tmp_path, old, new)


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(
        GemmateError, match=r"no data card 'tiny_quote'. Did you mean 'tiny_quotes'"
    ):
        read_card("tiny_quote")


def test_a_card_of_your_own_beside_its_file(tmp_path):
    rows = [{"quote": f"Quote number {i} of all", "author": "A", "tags": []} for i in range(20)]
    path = tmp_path / "toy.md"
    path.write_text(CARD.replace("train: 2", "train: 20"))
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_dataset_splits(DatasetConfig(id=str(path))).report.kept == 20
    path.write_text(CARD)
    with pytest.raises(GemmateError, match="expected 2, found 20"):
        load_dataset_splits(DatasetConfig(id=str(path)))


def test_every_shipped_card_is_read_and_has_its_facts():
    cards = {name: read_card(name) for name in card_paths()}
    assert {"tiny_quotes", "english_quotes"} <= set(cards)
    for card in cards.values():
        assert card.body.startswith("# ") and card.defects and card.license
        assert card.sha256 or card.source.revision, f"{card.name} is held by nothing"
        assert card.source.hub_id or card.sha256, f"{card.name} can be checked, so it must be"


@pytest.mark.skipif(
    importlib.util.find_spec("gemmate_lib.tiny.sayings") is None,
    reason="the generator of tiny_quotes is not there yet",
)
def test_tiny_quotes_is_as_its_card_says():
    splits = load_dataset_splits(DatasetConfig(id="tiny_quotes"))
    card = read_card("tiny_quotes")
    assert (splits.form, splits.report.read) == (card.format, 2_508)
    assert splits.report.exact_duplicates == 8
    assert splits.report.empty_optional["tags"] > 0


def english_quotes(monkeypatch, rows, fault=None):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        if fault:
            raise fault
        return SimpleNamespace(to_list=lambda: rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_english_quotes_is_loaded_at_its_pinned_revision(monkeypatch):
    rows = [{"quote": f"“Saying {i} of {i}.”", "author": "A,", "tags": []} for i in range(2_508)]
    calls = english_quotes(monkeypatch, rows)
    splits = load_dataset_splits(DatasetConfig(id="english_quotes", near_duplicate=1.0))
    revision = "7b544c4920a8be268b48b403c188acf0a462051b"
    assert calls == [(("Abirate/english_quotes",), {"revision": revision, "split": "train"})]
    assert splits.form == read_card("english_quotes").format
    assert splits.report.kept == 2_508
    other = "0" * 40
    load_dataset_splits(DatasetConfig(id="english_quotes", revision=other, near_duplicate=1.0))
    assert calls[1][1]["revision"] == other


def test_english_quotes_with_a_row_too_few_is_refused(monkeypatch):
    english_quotes(monkeypatch, [{"quote": "Q", "author": "A", "tags": []}] * 2_507)
    with pytest.raises(GemmateError, match=r"english_quotes does not match .* 2508, found 2507"):
        load_dataset_splits(DatasetConfig(id="english_quotes"))


def test_no_network_has_a_remedy(monkeypatch):
    english_quotes(monkeypatch, [], fault=ConnectionError("Couldn't reach the Hub"))
    with pytest.raises(GemmateError, match=r"Couldn't reach the Hub.*twin: tiny_quotes"):
        load_dataset_splits(DatasetConfig(id="english_quotes"))


def test_sst2_is_a_configuration_of_glue_and_its_test_is_glues_validation(monkeypatch):
    row = {"sentence": "it 's a charming journey . ", "label": 1, "idx": 0}
    calls = english_quotes(monkeypatch, [row] * 67_349)
    with pytest.raises(GemmateError, match=r"splits.test: expected 872, found 67349"):
        load_dataset_splits(DatasetConfig(id="sst2", labels={"0": "negative", "1": "positive"}))
    revision = read_card("sst2").source.revision
    assert calls == [
        (("nyu-mll/glue", "sst2"), {"revision": revision, "split": "train"}),
        (("nyu-mll/glue", "sst2"), {"revision": revision, "split": "validation"}),
    ]


def test_squad_v2_is_read_whole_from_the_hub(monkeypatch):
    row = {"id": "1", "title": "T", "context": "Ada met Ben.", "question": "Who?",
           "answers": {"text": ["Ben"], "answer_start": [8]}}  # fmt: skip
    calls = english_quotes(monkeypatch, [row] * 130_319)
    with pytest.raises(GemmateError, match=r"splits.test: expected 11873, found 130319"):
        load_dataset_splits(DatasetConfig(id="squad_v2"))
    assert [options["split"] for _, options in calls] == ["train", "validation"]
