"""The page of a blind evaluation in a real browser: judged, downloaded, read back."""

import csv
import fcntl
import html
import json
import os
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import pytest

from gemmate_lib.judge import key_of, write_sheet
from gemmate_lib.judgement import read_judgement

pytestmark = pytest.mark.skipif(browser.BINARY is None, reason=browser.WITHOUT)
PATIENCE = 90  # seconds, on a busy machine
MARKER = "<script>{}</script><img src=x onerror={}>"


class Tab:
    """A page in headless Chromium, driven through its pipe: real keys, clicks and downloads."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for _ in "io" for end in self._pipe()]
        read, self._write, self._read, write = pipes
        command = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self.process = subprocess.Popen(  # Chromium reads 3 and writes 4
            ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "-", str(browser.BINARY), *command],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self._asked, self._heard, self._session = 0, b"", None
        where = {"behavior": "allow", "downloadPath": str(self.downloads)}
        self.send("Browser.setDownloadBehavior", **where)
        target = self.send("Target.createTarget", url=page.as_uri())["targetId"]
        made = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = made["sessionId"]
        shown = f"location.href == {json.dumps(page.as_uri())} && document.readyState"
        self.until(lambda: self.run(shown) == "complete")  # first it is about:blank

    @staticmethod
    def _pipe() -> Iterator[int]:
        for end in os.pipe():
            yield end
            os.close(end)  # its copy beyond 20 stays

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer, mark, rest = self._heard.partition(b"\0")
            if not mark:
                assert select.select([self._read], [], [], PATIENCE)[0], f"no answer to {method}"
                self._heard += (heard := os.read(self._read, 1 << 16))
                assert heard, "Chromium is gone"
                continue
            self._heard = rest
            if (found := json.loads(answer)).get("id") == self._asked:
                assert "error" not in found, found
                return found["result"]

    def run(self, script: str) -> Any:
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, true: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE
        while not (found := true()):
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        where = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return {x: r.x + r.width / 2, y: r.y + r.height / 2}; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", **event, **where)

    def press(self, key: str, code: int) -> None:
        text = {"text": " "} if key == " " else {}
        for kind in ("keyDown", "keyUp"):
            about = {"key": key, "code": "Space" if key == " " else key}
            about |= {"windowsVirtualKeyCode": code} | (text if kind == "keyDown" else {})
            self.send("Input.dispatchKeyEvent", type=kind, **about)

    def download(self) -> Path:
        """Click the button, and return the file that lies there then."""
        before = {*self.downloads.iterdir()}
        self.click("#save")

        def arrived() -> list[Path]:
            new = {*self.downloads.iterdir()} - before
            return [file for file in new if file.suffix == ".csv" and file.stat().st_size]

        return self.until(arrived)[0]

    def close(self) -> None:
        os.close(self._write)  # Chromium ends with its pipe
        os.close(self._read)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def add_run(folder: Path, rows: list[tuple[str, str]]) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in rows]
    (folder / "predictions.jsonl").write_text("".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eight prompts; what makes a CSV, a page or a spreadsheet stumble stands in both texts."""
    folder = tmp_path_factory.mktemp("runs")
    evil = MARKER.format(browser.witness("evil"), browser.witness("handler"))
    hard = [
        "=1+1",
        ' "quoted", and\n\nlines\r\n',
        f"{evil}<!-- {{{{ 7 * 7 }}}}",
        "\t-x",
        " é 漢 🙂 ",
    ]
    hard += ["'=x", "</script>\u2028\\u003c", "a\x00b"]
    both = [[(f"{text}?", f"{text} {word}") for text in hard] for word in ("first", "second")]
    return add_run(folder / "nightingale", both[0]), add_run(folder / "albatross", both[1])


@pytest.fixture(scope="module")
def sheet(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("sheet") / "sheet.html"
    write_sheet(*runs, page, seed=3)
    return page


@pytest.fixture
def tab(sheet: Path, tmp_path: Path) -> Iterator[Tab]:
    opened = Tab(sheet, tmp_path / "chromium")
    yield opened
    opened.close()


def test_judged_by_clicks_downloaded_and_read_back(tab: Tab, sheet: Path) -> None:
    entries = json.loads(key_of(sheet).read_text("utf-8"))["pairs"]
    assert tab.run("document.querySelector('#count').textContent") == "0 of 8 answered"
    choices = {number: "left" if e["left"] == "B" else "right" for number, e in entries.items()}
    choices |= {"6": "tie", "7": "skip"}
    del choices["8"]
    for number, choice in choices.items():
        tab.click(f"[name=pair-{number}][value={choice}]")
    assert tab.run("document.querySelector('#count').textContent") == "7 of 8 answered"
    assert tab.run("document.querySelector('#bar').value") == 7
    file = tab.download()
    assert file.name == "answers.csv"
    found = read_judgement(file, key_of(sheet))
    assert (found.wins, found.losses, found.ties) == (5, 0, 1)
    assert (found.skipped, found.unanswered) == (1, 1)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        read = {row["pair"]: row["choice"] for row in csv.DictReader(stream)}
    assert read == choices | {"8": ""}


def test_an_empty_download_is_the_csv_sheet(
    tab: Tab, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    write_sheet(*runs, tmp_path / "same.csv", seed=3)
    assert tab.download().read_bytes() == (tmp_path / "same.csv").read_bytes()


def test_the_keyboard_alone_is_enough(tab: Tab, sheet: Path) -> None:
    def focused() -> str:
        return tab.run("document.activeElement.name || document.activeElement.id")

    tab.press("Tab", 9)
    assert focused() == "save"
    for number in range(1, 9):  # one stop for each group
        tab.press("Tab", 9)
        assert focused() == f"pair-{number}"
        tab.press(" ", 32)
        for _ in range(number % 4):
            tab.press("ArrowRight", 39)
    assert tab.run("document.querySelector('#count').textContent") == "8 of 8 answered"
    with tab.download().open(encoding="utf-8-sig", newline="") as stream:
        read = [row["choice"] for row in csv.DictReader(stream)]
    assert read == ["right", "tie", "skip", "left"] * 2


def test_light_dark_and_paper(tab: Tab) -> None:
    def colours(media: str, scheme: str) -> tuple[str, str]:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        tab.send("Emulation.setEmulatedMedia", media=media, features=[feature])
        style = "getComputedStyle(document.body)"
        return tab.run(f"{style}.color"), tab.run(f"{style}.backgroundColor")

    light, dark = colours("screen", "light"), colours("screen", "dark")
    assert light[0] != dark[0] and light[1] != dark[1]
    assert colours("print", "dark") == light
    assert tab.run("getComputedStyle(document.querySelector('header')).display") == "none"


def test_what_a_model_wrote_is_text(sheet: Path, tmp_path: Path) -> None:
    for page in (sheet, browser.without_policy(sheet)):
        with browser.beacon() as (_, asked):
            seen = browser.look(page, asked, tmp_path / "profile")
        assert "&lt;script&gt;" in seen.dom and "8 answered" in seen.dom and not seen.ran


def test_the_policy_holds_where_escaping_fails(sheet: Path, tmp_path: Path) -> None:
    """And without the policy the same page does run what is planted in it."""
    text = sheet.read_text("utf-8")
    with browser.beacon() as (address, asked):
        planted = MARKER.format(browser.witness("evil"), browser.witness("handler"))
        planted += f"<img src={address}/img><style>@import '{address}/css';</style>"
        wrong = tmp_path / "wrong.html"
        wrong.write_text(re.sub("</h1>", f"</h1>{planted}", text), "utf-8")
        seen = browser.look(wrong, asked, tmp_path / "profile")
        assert "<script>document" in seen.dom and not seen.ran and not seen.asked
        seen = browser.look(browser.without_policy(wrong), asked, tmp_path / "profile")
        assert seen.ran == {"evil", "handler"} and seen.asked == {"img", "css"}
    assert html.escape(browser.witness("evil")) in text
