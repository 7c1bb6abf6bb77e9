"""A blind sheet tells nothing, its key tells the truth, and what comes back is checked."""

import csv
import hashlib
import io
import json
import re
import sys
from base64 import b64encode
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from gemmate_lib import cli
from gemmate_lib.config import GemmateError
from gemmate_lib.judge import (
    CHOICES,
    COLUMNS,
    _cells,
    _page,
    _table,
    _visible,
    draw,
    key_of,
    text_of,
    write_sheet,
)
from gemmate_lib.judgement import Judgement, read_judgement
from gemmate_lib.stats import wilson

A = "nightingale"
B = "albatross"


def add_run(folder, *rows):
    """A run's folder with the predictions that `gemmate evaluate` writes into it."""
    folder.mkdir(parents=True)
    records = [{"prompt": prompt, "completion": text, "length": 1} for prompt, text in rows]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "predictions.jsonl").write_text(lines, "utf-8")
    return folder


def runs(folder, n=12):
    """Two runs that answer n prompts differently."""
    first = add_run(folder / A, *[(f"Say {i}", f" first {i}\nover") for i in range(n)])
    return first, add_run(folder / B, *[(f"Say {i}", f" second {i}\nover") for i in range(n)])


def rows_of(sheet):
    with sheet.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def fill(sheet, choose, **options):
    """Fill a CSV sheet: choose(row) is the choice."""
    rows = [row | {"choice": choose(row)} for row in rows_of(sheet)]
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, COLUMNS, **options)
    writer.writeheader()
    writer.writerows(rows)
    filled = sheet.with_name("filled.csv")
    filled.write_text(stream.getvalue(), "utf-8", newline="")
    return filled


def prefers(run):
    """A judge who recognises the words of a run."""
    word = {"A": "first", "B": "second"}[run]
    return lambda row: "left" if word in row["left"] else "right"


@pytest.fixture
def sheet(tmp_path):
    out = tmp_path / "sheet.csv"
    write_sheet(*runs(tmp_path / "secrets"), out)
    return out


# What is drawn


@given(st.integers(), st.integers(1, 40), st.none() | st.integers(1, 50))
def test_the_key_knows_each_side_and_each_run_is_left_in_half(seed, n, limit):
    pairs = [(f"p{i}", f"a{i}", f"b{i}") for i in range(n)]
    rows, entries = draw(pairs, limit=limit, seed=seed)
    assert [row[0] for row in rows] == list(range(1, min(n, limit or n) + 1))
    assert list(entries) == [str(row[0]) for row in rows]
    decoded = set()
    for number, prompt, left, right in rows:
        entry = entries[str(number)]
        texts = {entry.left: left, entry.right: right}
        decoded.add((prompt, texts["A"], texts["B"]))
        assert entry.sha256 == tuple(
            hashlib.sha256(text.encode()).hexdigest() for text in (prompt, left, right)
        )
    assert len(decoded) == len(rows) and decoded <= set(pairs)
    lefts = [entry.left for entry in entries.values()]
    assert abs(lefts.count("A") - lefts.count("B")) <= 1


def test_the_seed_draws_pairs_order_and_sides():
    pairs = [(f"p{i}", f"a{i}", f"b{i}") for i in range(30)]
    assert draw(pairs, limit=9, seed=4) == draw(pairs, limit=9, seed=4)
    drawn = [draw(pairs, limit=9, seed=seed)[0] for seed in range(40)]
    assert len({tuple(row[1] for row in rows) for rows in drawn}) == 40
    assert len({row[1] for rows in drawn for row in rows}) == 30
    patterns = {tuple(row[2][0] for row in rows) for rows in drawn}
    assert len(patterns) > 20  # neither always alternating nor always one side first
    single = [draw(pairs[:1], limit=None, seed=seed)[1]["1"].left for seed in range(200)]
    assert 70 < single.count("A") < 130  # of an odd number the last is drawn as well


@pytest.mark.parametrize("limit", [0, -1])
def test_a_sheet_without_pairs_is_refused(limit):
    with pytest.raises(GemmateError, match="Give 1 or more"):
        draw([("p", "a", "b")], limit=limit, seed=0)


# What is written


@pytest.mark.parametrize("kind", ["html", "csv"])
def test_the_sheet_tells_nothing_of_the_runs(kind, tmp_path):
    first, second = runs(tmp_path / "secrets")
    out = tmp_path / f"sheet.{kind}"
    write_sheet(first, second, out, seed=987654321)
    text = out.read_text("utf-8")
    assert "first 3" in text and "second 3" in text
    for telling in (A, B, "secrets", tmp_path.name, "987654321", 'sha256"', "run_"):
        assert telling not in text
    first.rename(tmp_path / "x")
    second.rename(tmp_path / "y")
    write_sheet(tmp_path / "x", tmp_path / "y", tmp_path / f"again.{kind}", seed=987654321)
    assert (tmp_path / f"again.{kind}").read_bytes() == out.read_bytes()
    told = key_of(out).read_text("utf-8")
    assert A in told and B in told and str(tmp_path) not in told


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    first = add_run(tmp_path / "1" / "run", ("p", "a"))
    second = add_run(tmp_path / "2" / "run", ("p", "b"))
    key = write_sheet(first, second, tmp_path / "sheet.csv")
    assert (key.run_a, key.run_b) == (str(first), str(second))


def test_only_the_same_prompts_are_paired_and_equal_texts_are_ties(tmp_path):
    first = add_run(
        tmp_path / A, ("p", "1"), ("same", "x"), ("p", "2"), ("only a", "-"), ("p", "1"), ("q", "5")
    )
    second = add_run(
        tmp_path / B, ("q", "6"), ("only b", "-"), ("p", "3"), ("p", "4"), ("same", "x"), ("p", "3")
    )
    key = write_sheet(first, second, tmp_path / "sheet.csv")
    assert (key.paired, key.equal, len(key.pairs)) == (4, 1, 3)
    assert (
        str(key)
        == "4 pairs with the same prompt, 1 of them equal (ties); 3 of the other 3 to judge"
    )
    shown = {
        (row["prompt"], *sorted((row["left"], row["right"])))
        for row in rows_of(tmp_path / "sheet.csv")
    }
    assert shown == {("p", "1", "3"), ("p", "2", "4"), ("q", "5", "6")}


def test_a_limit_draws_from_the_pairs_that_differ(tmp_path):
    first = add_run(tmp_path / A, *[(f"p{i}", "same" if i < 5 else "a") for i in range(15)])
    second = add_run(tmp_path / B, *[(f"p{i}", "same" if i < 5 else "b") for i in range(15)])
    key = write_sheet(first, second, tmp_path / "sheet.csv", limit=4)
    assert (key.paired, key.equal, len(key.pairs)) == (15, 5, 4)
    assert len(rows_of(tmp_path / "sheet.csv")) == 4


def test_what_cannot_be_paired_is_refused_and_nothing_is_written(tmp_path):
    first, second = runs(tmp_path)
    out = tmp_path / "sheets" / "sheet.html"
    bare = tmp_path / "bare"
    bare.mkdir()
    other = add_run(tmp_path / "other", ("elsewhere", "x"))
    broken = add_run(tmp_path / "broken", ("Say 1", None))
    for pair, message in (
        ((first, bare), f"Run `gemmate evaluate {bare}` first"),
        ((first, tmp_path / "nowhere"), "holds no predictions.jsonl"),
        ((first, other), "share no prompt"),
        ((first, first), "12 pairs, all equal"),
        ((first, broken), "row 0: no `prompt` and `completion`"),
    ):
        with pytest.raises(GemmateError, match=re.escape(message)):
            write_sheet(*pair, out)
    with pytest.raises(GemmateError, match="neither HTML nor CSV"):
        write_sheet(first, second, out.with_suffix(".xlsx"))
    assert not out.parent.exists()


@pytest.mark.parametrize("present", ["sheet.html", "sheet.key.json"])
def test_neither_a_sheet_nor_a_key_is_overwritten(present, tmp_path):
    first, second = runs(tmp_path)
    (tmp_path / present).write_text("mine")
    with pytest.raises(GemmateError, match=f"{present} exists"):
        write_sheet(first, second, tmp_path / "sheet.html")
    assert (tmp_path / present).read_text() == "mine"
    assert len([*tmp_path.glob("sheet.*")]) == 1


# CSV

tricky = st.text(st.sampled_from("'=+-@\t\r\n a\"＝＠,;\x00é") | st.characters(codec="utf-8"))


@given(tricky, tricky, tricky)
def test_no_cell_begins_a_formula_and_all_come_back(prompt, left, right):
    row = (1, prompt, left, right)
    cells = _cells(row)
    assert not [cell for cell in cells if re.match(r"\s*[=+\-@＝＋－＠]|[\t\r\n]", cell)]
    assert tuple(map(text_of, cells))[1:] == row[1:]
    _, (number, *read, choice) = csv.reader(io.StringIO(_table([row])[1:], newline=""))
    assert (number, choice) == ("1", "") and [text_of(cell) for cell in read] == [*row[1:]]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "\nx", " =1"])
def test_a_formula_gets_an_apostrophe(text):
    assert _cells((1, text, f"'{text}", "plain"))[1:] == [f"'{text}", f"''{text}", "plain"]
    assert text_of(f"'{text}") == text and text_of("'tis") == "'tis" and text_of("plain") == "plain"


def test_the_columns_are_those_and_excel_sees_utf_8(sheet):
    raw = sheet.read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf") and tuple(rows_of(sheet)[0]) == COLUMNS
    assert {row["choice"] for row in rows_of(sheet)} == {""}


# HTML


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [about for name, about in self.elements if name == tag]


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'"


def test_a_page_is_self_contained_and_its_policy_allows_its_own_script_alone():
    html = _page([(1, EVIL, f"{EVIL}<!--", EVIL), (2, "p", "a", "b")])
    page = Page(html)
    assert not {"img", "link", "iframe", "form", "object", "a"} & {tag for tag, _ in page.elements}
    assert not [name for _, about in page.elements for name in about if name.startswith("on")]
    assert not [about for _, about in page.elements if {"src", "href", "style"} & set(about)]
    assert "http:" not in html and "https:" not in html and html.count("<script") == 2
    policy = next(about["content"] for about in page.all("meta") if "http-equiv" in about)
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag in ("script", "style"):
        source = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        found = b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{found}'" in policy
    data = re.search(r'<script type="application/json" id="rows">(.*?)</script>', html)[1]
    cells = [["1", EVIL, f"{EVIL}<!--", EVIL], ["2", "p", "a", "b"]]
    assert json.loads(data) == [[*COLUMNS], *cells]  # and no word of the key


def test_each_pair_is_a_named_group_of_choices():
    page = Page(_page([(1, "p", "a", "b"), (2, "q", "c", "d")]))
    assert len(page.all("fieldset")) == len(page.all("legend")) == 2
    radios = page.all("input")
    assert [(r["name"], r["value"]) for r in radios] == [
        (f"pair-{number}", choice) for number in (1, 2) for choice in CHOICES
    ]
    assert {r["type"] for r in radios} == {"radio"} and not [r for r in radios if "checked" in r]
    assert len(page.all("label")) == 8 and "Pair 2 of 2" in page.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        (" a  b  ", "<i>·</i>a  b<i>··</i>"),
        ("a\nb", "a<i>↵\n</i>b"),
        ("a\r\nb\rc", "a<i>↵\n</i>b<i>↵\n</i>c"),
        ("a\n\n", "a<i>↵\n↵\n</i>"),
        ("a\tb", "a<i>⇥\t</i>b"),
        ("a\u00a0", "a<i>␣</i>"),
        ("  ", "<i>··</i>"),
        ("", "<i>(empty)</i>"),
        (" <b>&", "<i>·</i>&lt;b&gt;&amp;"),
    ],
)
def test_space_is_visible(text, shown):
    assert str(_visible(text)) == shown


# What comes back


def test_a_round_trip(sheet):
    found = read_judgement(fill(sheet, prefers("B")), key_of(sheet))
    assert (found.wins, found.losses, found.ties, found.equal) == (12, 0, 0, 0)
    assert (found.run_a, found.run_b, found.verdict()) == (A, B, "B preferred")
    assert found.preference == wilson(12, 12) and found.p_value == pytest.approx(2 / 2**12)
    found = read_judgement(fill(sheet, prefers("A")), key_of(sheet))
    assert (found.wins, found.losses, found.verdict()) == (0, 12, "A preferred")
    assert found.preference.value == 0


def test_ties_skipped_and_unanswered_are_told_apart(tmp_path):
    first = add_run(tmp_path / A, *[(f"p{i}", "same" if i < 3 else "first") for i in range(13)])
    second = add_run(tmp_path / B, *[(f"p{i}", "same" if i < 3 else "second") for i in range(13)])
    sheet = tmp_path / "sheet.csv"
    write_sheet(first, second, sheet)
    other = {"1": "tie", "2": "tie", "3": "skip", "4": "", "5": "skip", "6": "skip"}
    win = prefers("B")
    filled = fill(sheet, lambda row: other.get(row["pair"], win(row)))
    lines = filled.read_text("utf-8").splitlines()
    filled.write_text("\n".join(lines[:-1]), "utf-8")  # the last row is gone
    found = read_judgement(filled, key_of(sheet))
    assert (found.wins, found.losses, found.ties, found.equal) == (3, 0, 5, 3)
    assert (found.skipped, found.unanswered, found.preference.n) == (3, 2, 3)
    told = "\n".join(found.lines())
    assert f"A is {A}, B is {B}" in told and "ties 5 (3 of them equal, not shown)" in told
    assert "3 skipped, 2 unanswered" in told and "1.000 [0.44, 1.00] (n=3)" in told
    assert "p=0.25  within noise" in told


def test_nothing_decided_is_no_error(sheet):
    found = read_judgement(fill(sheet, lambda row: " TIE"), key_of(sheet))
    assert (found.ties, found.p_value, found.verdict()) == (12, 1.0, "within noise")
    assert "open, no pair is decided" in "\n".join(found.lines())
    again = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert again["preference"] == {"value": None, "low": 0.0, "high": 1.0, "n": 0}


@pytest.mark.parametrize(
    ("wins", "losses", "verdict"),
    [(5, 0, "within noise"), (6, 0, "B preferred"), (0, 6, "A preferred"), (7, 5, "within noise")],
)
def test_a_verdict_needs_the_interval_and_the_test(wins, losses, verdict, sheet):
    chosen = [prefers("B")] * wins + [prefers("A")] * losses + [lambda row: "skip"] * 12
    filled = fill(sheet, lambda row: chosen[int(row["pair"]) - 1](row))
    found = read_judgement(filled, key_of(sheet))
    assert (found.wins, found.losses, found.verdict()) == (wins, losses, verdict)
    if wins == 5:
        assert found.preference.low > 0.5 and found.p_value == 0.0625


def test_an_interval_with_one_half_in_it_decides_nothing():
    found = Judgement(A, B, 8, 2, 0, 0, 0, 0, preference=wilson(8, 10), p_value=0.01)
    assert found.preference.low < 0.5 and found.verdict() == "within noise"
    assert replace(found, preference=wilson(10, 10)).verdict() == "B preferred"


def damaged(sheet, change):
    """A filled sheet with its rows changed: change(rows) in place, or other rows."""
    filled = fill(sheet, prefers("B"))
    with filled.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    rows = change(rows) or rows
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows(rows)
    filled.write_text(stream.getvalue(), "utf-8", newline="")
    return filled


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: re.sub("\r?\n", "\r\n", text),
        lambda text: re.sub("\r?\n", "\n", text),
        lambda text: re.sub(r"\b(left|right)(\r\n)", lambda m: f"  {m[1].upper()} {m[2]}", text),
        lambda text: text.replace(
            "pair,prompt,left,right,choice", " Pair,PROMPT,Left,right ,CHOICE"
        ),
        lambda text: text + "\r\n,,,,\r\n , ,,,\r\n",
        lambda text: text.replace(",choice\r\n", ",choice,\r\n"),
    ],
    ids=["bom", "crlf", "lf", "upper case", "names", "empty rows", "a column without a name"],
)
def test_what_spreadsheets_do_is_accepted(change, sheet):
    filled = fill(sheet, prefers("B"))
    text = filled.read_bytes().decode()
    filled.write_bytes(change(text).encode())
    assert read_judgement(filled, key_of(sheet)).wins == 12


def test_columns_and_rows_in_another_order_and_more_of_them(sheet):
    def change(rows):
        moved = [[row[4], "note", row[3], row[0], row[2], row[1]] for row in rows]
        return [moved[0], *reversed(moved[1:])]

    assert read_judgement(damaged(sheet, change), key_of(sheet)).wins == 12


def put(row, column, text):
    def change(rows):
        rows[row][column] = text

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(3, 4, "both"), "row 4: 'both' is no choice for pair 3"),
        (put(3, 4, "l"), "row 4: 'l' is no choice"),
        (put(3, 0, "99"), "row 4: the key has no pair '99'"),
        (put(3, 0, ""), "row 4: the key has no pair ''"),
        (lambda rows: [*rows, rows[2]], "row 14: pair 2 is there twice"),
        (put(3, 0, "1"), "row 4: the texts of pair 1 are not the key's"),
        (put(5, 1, "other"), "row 6: the texts of pair 5"),
        (put(5, 2, "other"), "row 6: the texts of pair 5"),
        (put(5, 3, "other"), "row 6: the texts of pair 5"),
        (put(0, slice(2, 4), ["right", "left"]), "row 2: the texts of pair 1"),
        (lambda rows: [row[:4] for row in rows], "row 2: no column choice"),
        (lambda rows: [[";".join(row)] for row in rows], "Save it as CSV with commas"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change, message, sheet):
    with pytest.raises(GemmateError, match=re.escape(message)):
        read_judgement(damaged(sheet, change), key_of(sheet))


def test_the_key_of_another_sheet_is_refused(sheet, tmp_path):
    names = tmp_path / "secrets" / A, tmp_path / "secrets" / B
    filled = fill(sheet, prefers("B"))
    for seed in (1, 2, 3):
        other = tmp_path / f"other{seed}.csv"
        write_sheet(*names, other, seed=seed)
        with pytest.raises(GemmateError, match=r"row \d+: the texts of pair"):
            read_judgement(filled, key_of(other))


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"pairs": {}}'])
def test_a_file_that_is_no_key_is_refused(text, sheet, tmp_path):
    file = tmp_path / "wrong.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(GemmateError, match="is no key"):
        read_judgement(fill(sheet, prefers("B")), file)


def test_half_a_surrogate_pair_stops_nobody(tmp_path):
    first, second = add_run(tmp_path / A, ("p", "\ud83d")), add_run(tmp_path / B, ("p", "b"))
    write_sheet(first, second, tmp_path / "sheet.csv")
    row = rows_of(tmp_path / "sheet.csv")[0]
    assert {row["left"], row["right"]} == {"?", "b"}
    assert read_judgement(tmp_path / "sheet.csv", tmp_path / "sheet.key.json").unanswered == 1


# The command


def call(*words):
    result = CliRunner().invoke(cli.app, ["judge", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_writes_and_reads(tmp_path):
    first, second = runs(tmp_path / "secrets")
    sheet = tmp_path / "sheet.csv"
    told = call(first, second, "--out", sheet, "--limit", 8, "--seed", 5)
    assert "12 pairs" in told and "8 of the other 12 to judge" in told
    assert "sheet.key.json" in told
    key = json.loads(key_of(sheet).read_text("utf-8"))
    assert key["seed"] == 5 and len(key["pairs"]) == 8
    filled = fill(sheet, prefers("B"))
    told = call("--read", filled, "--key", key_of(sheet))
    assert "B preferred" in told and A in told and B in told
    found = json.loads(call("--read", filled, "--key", key_of(sheet), "--json"))
    assert (found["wins"], found["verdict"], found["run_b"]) == (8, "B preferred", B)
    counts = json.loads(call(first, second, "--out", tmp_path / "b.html", "--json"))
    assert (counts["paired"], counts["equal"], counts["to_judge"]) == (12, 0, 12)


def test_help_says_both_ways():
    told = " ".join(call("--help").split())
    assert "gemmate judge RUN_A RUN_B --out sheet.html" in told
    assert "gemmate judge --read answers.csv --key sheet.key.json" in told


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a"],
        ["a", "b"],
        ["--read", "x.csv"],
        ["--key", "x.json"],
        ["a", "b", "--out", "s.html", "--read", "x.csv", "--key", "x.json"],
        ["a", "b", "--out", "s.html", "--key", "x.json"],
    ],
)
def test_anything_else_is_one_sentence(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gemmate", "judge", *words])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and "--read ANSWERS.csv" in told
