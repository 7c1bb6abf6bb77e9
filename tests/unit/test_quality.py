"""What a data set is worth: each heading against rows whose fault is known; page and card draft."""

import json
import math
import random
import re

import pytest
from typer.testing import CliRunner

from gemmate_lib.cards import read_card
from gemmate_lib.cli import app
from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import load_dataset_splits
from gemmate_lib.models import load_tokenizer
from gemmate_lib.quality import effective, examine
from gemmate_lib.quality_page import draft_card, markdown, write_page
from gemmate_lib.verdicts import findings, rows_of

TOKENIZER = load_tokenizer("tiny-gemma", None)
MAIL = "jane.doe@example.org"
SCRIPT = "<script>document.title='owned'</script>"


def config(path, **settings):
    return DatasetConfig(id=str(path), max_length=100_000, **settings)


def measure(path, task=None, **settings):
    return examine(config(path, **settings), tokenizer=TOKENIZER, task=task)


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def reviews(n=300):
    kinds = {
        "film": ["actors", "plot", "camera", "scenes"],
        "book": ["pages", "author", "chapter", "prose"],
    }
    rows = []
    for i in range(n):
        kind = ("film", "book")[i % 2]
        words = kinds[kind]
        text = f"The {kind} number {i * 7} has {words[i % 4]} and {words[(i // 4) % 4]} of sort {i}"
        rows.append({"sentence": text, "label": ("bad", "good")[i % 3 > 0]})
    return rows


@pytest.fixture
def messy(tmp_path):
    rows = reviews()
    long = "the quick brown fox jumps over the lazy dog every single day of the week in spring"
    rows += [
        {"sentence": rows[0]["sentence"].upper() + "!", "label": "bad"},  # 300: a copy of 0
        {"sentence": rows[1]["sentence"], "label": "bad"},  # 301: row 1 says good
        {"sentence": long, "label": "good"},
        {"sentence": f"{long} again", "label": "good"},  # 303: nearly 302
        {"sentence": f"ask {MAIL} or 8.8.8.8", "label": "good", "note": "odd"},
        {"sentence": "cafÃ© don’t", "label": "good"},
        {"sentence": "cafe\u0301", "label": "good"},
        {"sentence": "", "label": "good"},
        {"sentence": f"{SCRIPT} $x_1$ {MAIL}", "label": SCRIPT},
        {"sentence": f"{SCRIPT} $x_1$ {MAIL}", "label": "good"},
    ]
    return save(tmp_path / "rows.jsonl", rows)


def test_every_fault_is_found_where_it_is(messy):
    found = measure(messy)
    assert (found.form, len(found.records), len(found.examples)) == ("classification", 310, 309)
    assert found.copies == [(0, 300)]
    assert (302, 303) in [pair[:2] for pair in found.near]
    assert found.conflicts == [(1, 301), (308, 309)]
    assert found.encodings == {"markup": [308, 309], "mojibake": [305], "not NFC": [306]}
    assert found.personal == {"IP address": [304], "e-mail address": [304, 308, 309]}
    assert found.balance == {"good": 206, "bad": 102, SCRIPT: 1}
    assert any("an extra key (row 304)" in line for line in found.report)
    levels = {finding.title: finding.level for finding in findings(found)}
    for title in ("Class balance", "Encodings", "Personal data", "Label conflicts"):
        assert levels[title] == "look", title


def test_a_clean_set_gives_no_cause_to_look(tmp_path):
    rng, words = random.Random(0), [f"word{i}" for i in range(200)]
    rows = [
        {"sentence": " ".join(rng.choices(words, k=8)), "label": f"l{i % 2}"} for i in range(500)
    ]
    found = measure(save(tmp_path / "a.jsonl", rows))
    assert (found.copies, found.encodings, found.personal) == ([], {}, {})
    levels = {f.title: f.level for f in findings(found)}
    for title in ("Size", "Class balance", "Encodings", "Personal data", "Label conflicts"):
        assert levels[title] == "fine", title
    assert levels["Relevance"] == "open"  # no texts of the task were given


@pytest.mark.parametrize(
    ("counts", "number"), [([5, 5, 5], 3.0), ([7], 1.0), ([], 0.0), ([3, 0], 1)]
)
def test_the_effective_number(counts, number):
    assert effective(counts) == pytest.approx(number)
    assert effective([1, 3]) == pytest.approx(math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)))


def test_topics_tell_films_from_books(tmp_path):
    found = measure(save(tmp_path / "a.jsonl", reviews()))
    assert sum(topic.rows for topic in found.topics) == 300
    assert {"film", "book"} <= {word for topic in found.topics for word in topic.words}
    assert 1.9 <= found.spread <= 8
    one = [{"sentence": "nothing but the same words", "label": "a"} for _ in range(50)]
    assert measure(save(tmp_path / "b.jsonl", one)).spread == pytest.approx(1.0)


def test_few_and_uneven_rows_want_a_look(tmp_path):
    rows = reviews(200)
    for row in rows[2:]:
        row["label"] = "good"
    levels = {f.title: f.level for f in findings(measure(save(tmp_path / "a.jsonl", rows)))}
    assert levels["Size"] == levels["Class balance"] == "look"


def test_relevance_is_measured_by_the_tasks_own_words(tmp_path):
    rows = reviews()
    path = save(tmp_path / "rows.jsonl", rows[:200])
    near = save(tmp_path / "near.jsonl", rows[200:])
    other = [{"sentence": "ships sail past a harbour", "label": "x"} for i in range(40)]
    far = save(tmp_path / "far.jsonl", other)
    own, foreign = (measure(path, task=config(task)).relevance for task in (near, far))
    assert own.coverage > 0.5 and len(own.outside) < 0.3 * 200
    assert foreign.coverage < 0.1 and "ships" in foreign.missing and len(foreign.outside) == 200


ROWS = {
    "instruction": (
        {"instruction": "Sum 1 and {i}", "input": "<noinput>", "output": "{i}1"},
        "Sum",
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "Sum {i}"}, {"role": "m", "content": "{i}"}]},
        "Sum",
    ),
    "reading": (
        {
            "context": "It is {i}.",
            "question": "What {i}?",
            "answers": {"text": [], "answer_start": []},
        },
        "What",
    ),
    "quotes": ({"quote": "Say {i}", "author": "A{i}"}, "Say"),
    "text": ({"text": "Only {i}"}, ""),
    "prompt-completion": ({"prompt": "Ask {i}", "completion": "Tell {i}"}, "Ask"),
}


@pytest.mark.parametrize("form", ROWS)
def test_every_form_is_measured(tmp_path, form):
    record, begins = ROWS[form]
    rows = [json.loads(json.dumps(record).replace("{i}", str(i))) for i in range(40)]
    found = measure(save(tmp_path / "a.jsonl", rows))
    assert (found.form, len(found.examples)) == (form, 40)
    assert all(each.asked.startswith(begins) for each in found.examples)
    assert not any("noinput" in each.text for each in found.examples)
    assert len(findings(found)) == 9


def test_nothing_usable_is_refused(tmp_path):
    with pytest.raises(GemmateError, match="no row of the form"):
        measure(save(tmp_path / "a.jsonl", [{"text": " "}]))


def test_the_page_runs_nothing_and_tells_no_personal_data(messy, tmp_path):
    page = write_page(measure(messy), tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert MAIL not in page and "8.8.8.8" not in page
    assert "default-src 'none'" in page and page.count("data:image/png;base64,") == 4
    alts = re.findall(r'<img src="[^"]+" alt="([^"]+)"', page)
    assert len(alts) == 4 and all(len(alt) > 20 for alt in alts)
    assert "Jaccard" in page and "Same input, other output" in page
    with pytest.raises(GemmateError, match=r"Name it \.html"):
        write_page(measure(messy), tmp_path / "page.pdf")


def test_the_draft_is_a_card_that_the_checker_accepts(messy, tmp_path):
    out = draft_card(measure(messy), config(messy), tmp_path / "cards" / "rows.md")
    card, text = read_card(out), out.read_text("utf-8")
    assert card.features == {"sentence": "string", "label": "string", "note": "absent or string"}
    assert (card.source.file, card.splits) == ("../rows.jsonl", {"train": 310})
    assert any(defect.startswith("Personal data: ") for defect in card.defects)
    assert "<script" not in card.body and MAIL not in text and "8.8.8.8" not in text
    done = CliRunner().invoke(app, ["card", "check", str(out)])
    assert done.exit_code == 0 and "310 rows, as the card says" in done.output
    assert load_dataset_splits(config(out)).report.read == 310
    rows = messy.read_text("utf-8").splitlines()
    messy.write_text("\n".join([*rows[:-1], '{"sentence": "x", "label": 1}']), "utf-8")
    broken = CliRunner().invoke(app, ["card", "check", str(out)])
    assert isinstance(broken.exception, GemmateError)
    assert "features.label of row 309: expected string, found int" in str(broken.exception)


def test_a_draft_overwrites_nothing_and_needs_a_file(messy, tmp_path):
    found, out = measure(messy), tmp_path / "rows.md"
    draft_card(found, config(messy), out)
    with pytest.raises(GemmateError, match="exists"):
        draft_card(found, config(messy), out)
    with pytest.raises(GemmateError, match="no data file"):
        draft_card(found, config("tiny_reviews"), tmp_path / "b.md")


def test_half_a_character_leaves_the_checksum_out(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"row {i}"} for i in range(20)] + [{"text": "\ud83d"}]))
    found = measure(path)
    assert found.encodings == {"half a character": [20]}
    assert read_card(draft_card(found, config(path), tmp_path / "a.md")).sha256 is None


def test_markdown_is_escaped():
    assert markdown("<b>|x|\n# a_b* [l](u) `c` & d") == (
        r"&lt;b\>\|x\| \# a\_b\* \[l\]\(u\) \`c\` &amp; d"
    )


def test_row_numbers_are_cut_short():
    assert rows_of([3]) == "row 3" and rows_of(range(9)) == "rows 0, 1, 2, 3, 4, 5, 6, 7, …"


def test_the_command_prints_and_writes(messy, tmp_path):
    out, card = tmp_path / "q.html", tmp_path / "q.md"
    given = ["card", "report", str(messy), "--task", str(messy), "--out", str(out)]
    done = CliRunner().invoke(app, [*given, "--card", str(card)])
    assert done.exit_code == 0, done.output
    assert out.is_file() and card.is_file() and MAIL not in done.output
    assert "look  Personal data: IP address: 1 (row 304); e-mail address: 3" in done.output
    assert "100% of the running words of rows.jsonl occur here" in done.output


def test_real_instructions_are_measured(real):
    found = measure(real("instructions_toolformer.json"))
    assert len(found.records) == len(found.examples) == 2_396
    assert {795, 974} <= set(found.encodings["mojibake"])  # 68Â°F
    assert found.personal["e-mail address"] == [1_264]
    assert any("an extra key (row 1486)" in line for line in found.report)
