"""The server's page in headless Chromium, against the real server and the embedded model."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import browser
import httpx
import pytest
from small_run import make_run

from gemmate_lib.config import Facts, ModelConfig, resolve
from gemmate_lib.formats import write_rows
from gemmate_lib.serve.answers import Ask
from gemmate_lib.serve.api import build_app
from gemmate_lib.serve.engine import Engine
from gemmate_lib.serve.limits import Limits
from gemmate_lib.serve.opening import open_engine
from gemmate_lib.serve.page import page as made_page
from gemmate_lib.serve.server import address_of, bind, make_server
from gemmate_lib.sft import Run, finetune_model, load_run
from gemmate_lib.shipped import shipped_run

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(browser.BINARY is None, reason=browser.WITHOUT)
PATIENCE = 60_000  # milliseconds, on a busy machine
PROMPT = "Quote: Imagination is more"
TODAY = "What is today's date?"
EVIL = "<img src=x onerror={}><script>{}</script>"
KEY = "a key that nobody guesses"


@contextmanager
def served(engine: Engine, key: str | None = None) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of a server over an engine, and what stops it."""
    listener: socket.socket = bind("127.0.0.1", 0)
    server = make_server(build_app(engine, engine.limits, key), engine, limits=engine.limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)

    def stop() -> None:
        server.should_exit = server.force_exit = True
        thread.join(20)
        listener.close()

    thread.start()
    try:
        yield address_of(listener), stop
    finally:
        stop()


def evil_run(folder: Path) -> Run:
    """A model that writes markup, whatever it is asked."""
    text = f" <img src=x onerror={browser.witness('said')}>"
    rows = [{"prompt": f"Say {i}:", "completion": text} for i in range(40)]
    folder.mkdir()
    write_rows(folder / "rows.jsonl", rows)
    quick = {"max_steps": 20, "learning_rate": 0.03, "batch_size": 4, "warmup_steps": 2}
    given = {"dataset": str(folder / "rows.jsonl"), "dataset.near_duplicate": 1.0,
             "eval_every": 0, "model.quantization": "none"}  # fmt: skip
    found = resolve("quotes", facts=Facts(), profile="tiny", overrides=quick | given)
    return finetune_model(found.experiment, out=folder / "run")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The base, a plain adapter, a time-aware one, and one that is markup by name and answer."""
    folder = tmp_path_factory.mktemp("served")
    make_run(folder / "plain", ModelConfig(), PROMPT)
    made = open_engine({"plain": load_run(folder / "plain"), "when": shipped_run(folder / "when")})
    made.add(EVIL.format(*[browser.witness("name")] * 2), evil_run(folder / "evil"))
    yield made
    made.close(0)


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(engine) as (found, _):
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=browser.BINARY, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(chromium: Any, address: str) -> Iterator[Any]:
    with opened(chromium, address) as page:
        yield page


@contextmanager
def opened(chromium: Any, address: str, *, models: bool = True, **options: Any) -> Iterator[Any]:
    """The page in a tab of its own; `asked`: the address of every request that it made."""
    with chromium.new_context(timezone_id="America/New_York", **options) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.asked, page.bodies = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("request", lambda request: page.bodies.append(request.post_data_json))
        page.goto(address)
        if models:
            page.wait_for_selector("#left:not([disabled])")
        yield page


def ask(page: Any, left: str, right: str, prompt: str, tokens: int = 24) -> None:
    page.select_option("#left", left)
    page.select_option("#right", right)
    page.fill("#prompt", prompt)
    page.fill("#tokens", str(tokens))
    page.click("#send")


def answers(page: Any) -> list[str]:
    """Both texts, when they are written."""
    page.wait_for_selector("#send:not([aria-disabled])")
    return [page.text_content(f"#{side}-text") for side in ("left", "right")]


def by_api(address: str, model: str, prompt: str, tokens: int = 24, **more: Any) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0} | more
    done = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    return done.raise_for_status().json()["choices"][0]["text"]


WATCH = """() => {
  window.pieces = {left: [], right: []};
  for (const side of ["left", "right"]) {
    const add = (node) => window.pieces[side].push([node.nodeName, node.data]);
    const seen = new MutationObserver((all) => all.forEach((one) => one.addedNodes.forEach(add)));
    seen.observe(document.querySelector(`#${side}-text`), {childList: true});
  }
}"""


def test_two_answers_are_those_of_the_api_and_come_in_pieces(tab: Any, address: str) -> None:
    tab.evaluate(WATCH)
    ask(tab, "tiny-gemma", "plain", PROMPT)
    found = answers(tab)
    assert found == [by_api(address, name, PROMPT) for name in ("tiny-gemma", "plain")]
    assert found[0] != found[1]
    for side, text in zip(("left", "right"), found, strict=True):
        pieces = tab.evaluate(f"window.pieces.{side}")
        assert len(pieces) > 3 and {name for name, _ in pieces} == {"#text"}
        assert "".join(piece for _, piece in pieces) == text
        assert tab.text_content(f"#{side}-asked") == PROMPT
        assert tab.text_content(f"#{side}-note") in ("Ended by itself.", "Cut off after 24 tokens.")
    assert tab.text_content("#right-name") == "plain"


def test_the_picked_time_is_utc_and_changes_the_answer(tab: Any, address: str) -> None:
    assert tab.locator("#time").is_hidden()
    tab.select_option("#right", "when")
    assert tab.locator("#time").is_visible() and "UTC" in tab.text_content("label[for=when]")
    assert (
        abs(tab.evaluate("document.querySelector('#when').valueAsNumber / 1000") - time.time())
        < 300
    )
    seen = []
    for picked, timestamp in (
        ("2009-02-13T23:31", 1234567860000),
        ("1999-12-31T00:00", 946598400000),
    ):
        tab.fill("#when", picked)
        tab.bodies.clear()
        ask(tab, "plain", "when", TODAY)
        seen.append(answers(tab)[1])
        sent = {body["model"]: body for body in tab.bodies}
        assert "timestamp" not in sent["plain"] and sent["when"]["timestamp"] == timestamp
        assert seen[-1] == by_api(address, "when", TODAY, timestamp=timestamp)
    assert "2009" in seen[0] and "1999" in seen[1]
    tab.fill("#when", "")
    tab.bodies.clear()
    ask(tab, "plain", "when", TODAY)
    assert answers(tab)[1] and all("timestamp" not in body for body in tab.bodies)


def test_names_prompts_and_answers_are_text(chromium: Any, address: str) -> None:
    """And without the policy too: what is escaped must hold by itself."""
    for bypass in (False, True):
        with opened(chromium, address, bypass_csp=bypass) as page:
            name = page.locator("#left option").nth(3).get_attribute("value")
            prompt = EVIL.format(*[browser.witness("asked")] * 2)
            ask(page, "plain", "tiny-gemma", prompt, tokens=1)
            answers(page)
            assert page.text_content("#left-asked") == prompt
            ask(page, name, "tiny-gemma", "Say 3:", tokens=60)
            assert answers(page)[0] == f" <img src=x onerror={browser.witness('said')}>"
            assert page.text_content("#left-name") == name and name.startswith("<img src=x onerror")
            assert page.evaluate("({...document.documentElement.dataset})") == {}
            assert page.locator("img, main script").count() == 0


def test_stop_frees_the_slots(tab: Any, address: str, engine: Engine) -> None:
    ask(tab, "plain", "plain", PROMPT, tokens=500)
    tab.wait_for_selector("#left-text:not(:empty)")
    tab.click("#stop")
    short = answers(tab)
    until(lambda: engine.idle)
    assert {tab.text_content(f"#{side}-note") for side in ("left", "right")} == {"Stopped."}
    whole = by_api(address, "plain", PROMPT, tokens=500)
    assert all(whole.startswith(text) and len(text) < len(whole) for text in short)
    assert tab.evaluate("document.activeElement.id") == "send"


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_the_keyboard_alone_is_enough(tab: Any) -> None:
    order = []
    for _ in range(9):
        tab.keyboard.press("Tab")
        order.append(tab.evaluate("document.activeElement.id"))
        if order[-1] == "right":
            tab.keyboard.type("when")
        if order[-1] == "prompt":
            tab.keyboard.type(TODAY)
        assert (
            order[-1] == ""
            or tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        )
    # A date picker has several stops of its own.
    assert list(dict.fromkeys(order))[:4] == ["left", "right", "prompt", "tokens"]
    tab.focus("#prompt")
    tab.keyboard.press("Control+Enter")
    assert all(answers(tab))
    tab.fill("#tokens", "500")
    tab.keyboard.press("Control+Enter")
    tab.keyboard.press("Escape")
    answers(tab)
    assert "Stopped." in {tab.text_content(f"#{side}-note") for side in ("left", "right")}


def test_every_control_has_a_name_and_the_page_its_landmarks(tab: Any) -> None:
    tab.select_option("#right", "when")
    ask(tab, "tiny-gemma", "when", TODAY)
    answers(tab)
    session = tab.context.new_cdp_session(tab)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    found: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            name = node.get("name", {}).get("value", "")
            found.setdefault(node["role"]["value"], []).append(name)
    for role in ("button", "combobox", "textbox", "spinbutton", "DateTime", "region"):
        assert found.get(role) and all(found[role]), (role, found.get(role))
    assert {"banner", "main", "heading"} <= found.keys()
    assert found["combobox"] == ["Left model", "Right model"]
    assert {"Prompt"} <= set(found["textbox"]) and "Asked at, in UTC" in found["DateTime"]
    assert found["heading"] == ["Two answers side by side", "tiny-gemma", "when"]
    for side in ("left", "right"):
        assert tab.get_attribute(f"#{side}-text", "aria-live") == "polite"
        assert tab.get_attribute(f"#{side}-text", "aria-busy") == "false"


CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const found = rgb(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
  };
  const shown = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility()
    && !e.disabled && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return shown.map((e) => {
    const pair = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => b - a);
    return [(pair[0] + 0.05) / (pair[1] + 0.05), e.outerHTML.slice(0, 80)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark_and_on_a_phone(
    chromium: Any, address: str, scheme: str
) -> None:
    size = {"width": 320, "height": 640}
    with opened(chromium, address, color_scheme=scheme, viewport=size) as page:
        ask(page, "plain", "when", TODAY)
        answers(page)
        page.evaluate("problem('Something went wrong.')")
        page.evaluate("note('left', 'The answer broke off.', true)")
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 15 and min(ratios)[0] >= 4.5, min(ratios)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        lefts = [page.locator(f"#{side}-text").bounding_box()["x"] for side in ("left", "right")]
        assert lefts[0] == lefts[1]  # one below the other


def test_the_policy_stops_what_was_planted(chromium: Any, address: str) -> None:
    """And without the policy the same does run."""
    plant = """(code) => {
      const script = document.createElement("script");
      script.textContent = code;
      document.body.append(script);
      document.body.insertAdjacentHTML("beforeend", `<img src=x onerror="${code}">`);
      return fetch(ELSEWHERE, {mode: "no-cors"}).then(() => "sent", () => "not sent");
    }"""
    for bypass in (False, True):
        with (
            browser.beacon() as (elsewhere, asked),
            opened(chromium, address, bypass_csp=bypass) as page,
        ):
            script = plant.replace("ELSEWHERE", json.dumps(f"{elsewhere}/x"))
            page.evaluate(script, browser.witness("planted"))
            page.wait_for_timeout(200)
            ran = page.evaluate("document.documentElement.dataset.planted ?? null")
            assert (ran == "1") == bypass and (asked == {"x"}) == bypass


def test_nothing_leaves_the_servers_origin(tab: Any, address: str) -> None:
    ask(tab, "plain", "when", TODAY)
    answers(tab)
    assert len(tab.asked) >= 4
    assert all(url.startswith((f"{address}/", "data:")) for url in tab.asked), tab.asked
    head = httpx.get(f"{address}/").headers
    assert head["x-content-type-options"] == "nosniff" and head["referrer-policy"] == "no-referrer"
    policy = head["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    html, _ = made_page()
    assert (
        "http://" not in html.replace("http://www.w3.org/2000/svg", "") and "https://" not in html
    )


def test_the_key_is_asked_for_and_kept_in_memory_alone(chromium: Any, engine: Engine) -> None:
    with served(engine, KEY) as (address, _), opened(chromium, address, models=False) as page:
        page.wait_for_selector("#key-form:not([hidden])")
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.locator("#ask").is_hidden() and page.locator("#problem").is_hidden()
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        page.get_by_text("did not accept").wait_for()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#left:not([disabled])")
        assert page.locator("#key-form").is_hidden() and page.locator("#problem").is_hidden()
        ask(page, "tiny-gemma", "plain", PROMPT)
        assert all(answers(page))
        kept = "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert page.evaluate(kept) == [0, 0, "", f"{address}/"]
        assert page.input_value("#key") == "" and KEY not in page.content()
        page.reload()
        page.wait_for_selector("#key-form:not([hidden])")


def test_troubles_are_said_in_words(chromium: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "plain", ModelConfig(), PROMPT)
    limits = Limits(slots=1, queue=1, prompt_tokens=20)
    engine = open_engine({"plain": load_run(tmp_path / "plain")}, limits=limits)

    def said(page: Any) -> str:
        answers(page)
        return page.text_content("#left-note")

    with closing(engine), served(engine) as (address, stop), opened(chromium, address) as page:
        ask(page, "plain", "tiny-gemma", "word " * 60)
        assert "of 20 at most" in said(page)
        ask(page, "plain", "tiny-gemma", PROMPT, tokens=9999)
        assert "of 512 at most" in said(page)
        busy = [engine.submit(Ask("plain", PROMPT, 500))]
        until(lambda: engine.load().running == 1)
        busy.append(engine.submit(Ask("plain", PROMPT, 500)))
        ask(page, "plain", "plain", PROMPT)
        assert "all the work it can take. Try again in" in said(page)
        engine.remove("plain")
        ask(page, "plain", "plain", PROMPT)
        assert "There is no model" in said(page)
        until(lambda: page.locator("#left option").count() == 1)  # the list was read again
        engine.drain()
        ask(page, "tiny-gemma", "tiny-gemma", PROMPT)
        assert "starting or stopping. Try again in 5 s." in said(page)
        for answer in busy:
            answer.cancel()
        stop()
        ask(page, "tiny-gemma", "tiny-gemma", PROMPT)
        assert "cannot be reached" in said(page)
