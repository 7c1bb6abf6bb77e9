import json
from html.parser import HTMLParser

import pytest

from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.manifest import write_manifest
from gemmate_lib.report import clean, flat, plain, write_report

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><b onclick=alert(1)>"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAAB"
PNG += "JRU5ErkJggg=="


class Page(HTMLParser):
    """A page's elements with their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html if isinstance(html, str) else html.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def cell(kind, source, outputs=()):
    about = {"cell_type": kind, "id": f"c{abs(hash(source)) % 10**8}", "metadata": {}}
    code = {"execution_count": 1, "outputs": list(outputs)} if kind == "code" else {}
    return about | {"source": source} | code


def output(data, metadata=None):
    return {"output_type": "display_data", "data": data, "metadata": metadata or {}}


def add_notebook(folder, name, cells, **record):
    base = {"notebook": name, "profile": "tiny", "parameters": {}, "cells": 4, "executed": 4}
    base |= {"seconds": 2.5, "main_metric": None, "error": None, "skipped": None}
    base |= {"state": "ok", "ok": True, "finished": "2026-01-02T03:04:05+00:00"}
    for part in ("manifests", "notebooks"):
        (folder / part).mkdir(exist_ok=True)
    text = json.dumps(base | record)
    (folder / "manifests" / f"{name}.json").write_text(text, encoding="utf-8")
    if cells:
        content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        text = json.dumps(content)
        (folder / "notebooks" / f"{name}.ipynb").write_text(text, encoding="utf-8")


def add_run(folder, name, **settings):
    metrics = {"last_loss": 1.98765, "author_accuracy": {"value": 0.79, "low": 0.71, "high": 0.86}}
    metrics["author_accuracy"]["n"] = 250
    parts = {"facts": {"threads": 1}, "data": {}, "base": {}, "timings": {"train": 41.7}}
    experiment = Experiment.model_validate({"name": "quotes"} | settings)
    write_manifest(folder / name, kind="sft", experiment=experiment, metrics=metrics, **parts)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The folder of a course in which every text is an attack."""
    folder = tmp_path_factory.mktemp("course")
    outputs = [
        output({"image/png": PNG, "text/plain": "x"}, {"image/png": {"alt": f"Rows {EVIL}"}}),
        output({"text/html": f"<table><tr><td>{EVIL}</td></tr></table>"}),
        output({"text/markdown": EVIL}),
        output({"image/svg+xml": f"<svg>{EVIL}</svg>"}),
        output({"application/javascript": "alert(1)"}),
        output({"text/latex": EVIL}),
        {"output_type": "stream", "name": "stdout", "text": f"main metric: {EVIL}\n"},
        {"output_type": "error", "ename": "E", "evalue": EVIL, "traceback": [EVIL]},
    ]
    cells = [cell("markdown", f"# Title {EVIL}"), cell("markdown", "## Second\n\nA *word*.")]
    cells.append(cell("markdown", "[a](javascript:alert(1)) ![b](https://example.org/b.png)"))
    cells += [cell("code", f"print('''{EVIL}''')", outputs), cell("raw", EVIL)]
    add_notebook(folder, "01_data", cells, main_metric=EVIL, parameters={"rows": EVIL})
    state = {"state": "failed", "ok": False}
    add_notebook(folder, "03_sft", [], error={"cell": 3, "message": EVIL}, **state)
    add_notebook(folder, "05_evaluate", [], skipped=EVIL, state="skipped", ok=False)
    add_run(folder / "runs", "quotes-1", dataset={"id": EVIL})
    (folder / "runs" / "broken").mkdir()
    (folder / "runs" / "broken" / "manifest.json").write_text("{}", encoding="utf-8")
    return folder, write_report(folder)


@pytest.mark.parametrize("name", ["report.html", "notebooks/01_data.html"])
def test_nothing_in_a_page_runs_or_is_fetched(hostile, name):
    page = Page(hostile[0] / name)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "svg", "link", "form"}
    assert not [a for _, about in page.elements for a in about if a.startswith("on")]
    assert all(
        about["src"].startswith("data:image/") for about in page.all("img") if "src" in about
    )
    assert not [a for a in page.all("a") if a.get("href", "").startswith(("javascript", "data"))]
    policies = [about for about in page.all("meta") if "http-equiv" in about]
    assert policies[0]["content"].startswith("default-src 'none'")
    assert "<script>alert(1)</script>" in page.text  # shown, not dropped


def test_the_page_has_figures_with_alt_text_and_links_to_the_notebooks(hostile):
    page = Page(hostile[1])
    assert [about["alt"] for about in page.all("img")] == [f"Rows {EVIL}"]
    assert page.all("img")[0]["src"] == f"data:image/png;base64,{PNG}"
    links = [about["href"] for about in page.all("a")]
    assert "notebooks/01_data.html" in links
    assert "notebooks/05_evaluate.html" not in links
    named = {about.get("id") for _, about in page.elements}
    assert {"#01_data", "#03_sft", "#05_evaluate"} <= set(links)
    assert {"01_data", "03_sft", "05_evaluate"} <= named


def test_the_page_tells_states_metrics_and_settings(hostile):
    text = Page(hostile[1]).text
    assert "1 of 3 notebooks ran to their end" in text
    assert "2026-01-02 03:04 UTC" in text
    assert f"cell 3: {EVIL}" in text
    for part in ("1.988", "0.790 [0.71, 0.86] (n=250)", "training.learning_rate", "41.7"):
        assert part in text
    assert "No sound manifest" in text  # the broken run is told of, not left out


def test_an_executed_notebook_keeps_its_headings_code_and_alt_text(hostile):
    page = Page(hostile[0] / "notebooks" / "01_data.html")
    assert {"h1", "h2", "em", "pre"} <= {tag for tag, _ in page.elements}
    assert f"Rows {EVIL}" in [about.get("alt") for about in page.all("img")]
    assert "application/javascript" not in page.text


def test_a_half_written_notebook_is_left_out_and_told_of(tmp_path):
    add_notebook(tmp_path, "03_sft", [], state="failed", ok=False)
    (tmp_path / "notebooks" / "03_sft.ipynb").write_text('{"cells": [', encoding="utf-8")
    page = Page(write_report(tmp_path))
    assert "failed" in page.text
    assert "notebooks/03_sft.html" not in [about.get("href") for about in page.all("a")]


def test_a_manifest_reads_no_notebook_from_elsewhere(tmp_path):
    folder = tmp_path / "course"
    folder.mkdir()
    add_notebook(folder, "01_data", [])
    add_notebook(tmp_path, "secret", [cell("markdown", "# Secret")])
    file = folder / "manifests" / "01_data.json"
    text = file.read_text("utf-8").replace('"01_data"', '"../../notebooks/secret"')
    file.write_text(text, encoding="utf-8")
    assert "Secret" not in write_report(folder).read_text("utf-8")
    assert not list((tmp_path / "notebooks").glob("*.html"))


def test_a_folder_of_runs_is_a_report_as_well(tmp_path):
    add_run(tmp_path, "quotes-1")
    text = Page(write_report(tmp_path)).text
    assert "quotes-1" in text
    assert "Notebooks" not in text


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(GemmateError, match="holds no runs"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("<p>a <b>b</b></p>", "<p>a <b>b</b></p>"),
        ("<style>p {color: red}</style><p>a</p>", "<p>a</p>"),
        ("<h2 onclick='x' style='y' id='i'>a</h2>", '<h2 id="i">a</h2>'),
        ('<a href="03_sft.ipynb#top">a</a>', '<a href="03_sft.ipynb#top">a</a>'),
        ('<a href="https://example.org">a</a>', '<a href="https://example.org">a</a>'),
        ('<a href="java\tscript:alert(1)">a</a>', "<a>a</a>"),
        ('<a href=" data:text/html,x">a</a>', "<a>a</a>"),
        ('<a href="da\nta:text/html,x">a</a>', "<a>a</a>"),
        ('<a href="&#106;avascript:alert(1)">a</a>', "<a>a</a>"),
        ('<img src="https://example.org/a.png" alt="a">', '<img alt="a">'),
        ('<img src="data:image/svg+xml;base64,AA" alt="a">', '<img alt="a">'),
        ("<script>a</script>", "&lt;script&gt;a&lt;/script&gt;"),
    ],
)
def test_clean(given, expected):
    assert clean(given) == expected


def test_a_cleaned_figure_stays():
    figure = f'<img src="data:image/png;base64,{PNG}" alt="a">'
    expected = {"src": f"data:image/png;base64,{PNG}", "alt": "a"}
    assert Page(clean(figure)).all("img") == [expected]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (0, "0"),
        (True, "yes"),
        (False, "no"),
        (None, "none"),
        (0.000212345, "0.0002123"),
        (("a", 1.0), "a, 1"),
        ((), "none"),
        ("text", "text"),
    ],
)
def test_plain(value, text):
    assert plain(value) == text


def test_flat_keeps_an_interval_whole():
    record = {"a": {"b": 1, "c": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}, "d": None}
    assert flat(record) == {"a.b": "1", "a.c": "0.500 [0.40, 0.60] (n=9)", "d": "none"}
