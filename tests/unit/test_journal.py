"""The journal of a run as others read it: half lines, dead processes, resumes, and how it looks."""

import io
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from gemmate_lib.config import GemmateError
from gemmate_lib.journal import JOURNAL, PATIENCE, Journal, machine_name, printable, read_journal
from gemmate_lib.run_page import smoothed, write_run_page
from gemmate_lib.watch import BLOCKS, chart, duration, follow, show_frame

Write = Callable[..., Path]
USE = {"cpu_percent": 99.0, "rss_mib": 2048.0, "available_mib": 4096.0, "tokens_per_second": 1e4,
       "gpu0_used_mib": 1024.0, "gpu0_total_mib": 4096.0, "gpu0_percent": 87.0}  # fmt: skip


def here(**changed: Any) -> dict[str, Any]:
    """The begin of a run of this very process, ten steps long."""
    process = psutil.Process()
    found = {"event": "begin", "step": 0, "steps": 10, "pid": os.getpid(), "name": "quotes"}
    found |= {"started": process.create_time(), "machine": machine_name()}
    return found | changed


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"event": "log", "step": number, "epoch": number / 10, "loss": loss} | more


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def append(*records: dict[str, Any], end: str = "\n") -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps({"time": time.time(), "spent": 0.25} | record) for record in records]
        with (folder / JOURNAL).open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + end)
        return folder

    return append


def test_what_a_run_says_of_itself(write: Write) -> None:
    now = time.time()
    folder = write(
        here(time=now - 9), step(1, 2.0, time=now - 4), step(2, 1.0, time=now - 2, use=USE)
    )
    run = read_journal(folder)
    assert (run.state, run.over, run.step, run.steps) == ("training", False, 2, 10)
    assert run.curves["loss"] == [(1, 2.0), (2, 1.0)] and run.last("gpu0_percent") == 87.0
    assert run.step_seconds == pytest.approx(2.0) and run.seconds_left == pytest.approx(16.0)
    assert run.spent == 0.25 and run.sentence() == "training, after step 2 of 10"
    write(step(2, 0.0) | {"eval_loss": 1.5}, {"event": "checkpoint", "step": 2})
    assert run.update().last("eval_loss") == 1.5 and run.checkpoints == [2]
    assert json.loads(json.dumps(run.as_dict()))["newest"]["eval_loss"] == 1.5


def test_half_a_line_is_left_for_later_and_a_broken_one_passed_over(write: Write) -> None:
    folder = write(here(), step(1, 2.0))
    run = read_journal(folder)
    whole = json.dumps(step(2, 1.0) | {"time": time.time()})
    for part in (whole[:20], whole[20:] + "\n"):
        with (folder / JOURNAL).open("a") as file:
            file.write(part)
        run.update()
    assert run.step == 2
    with (folder / JOURNAL).open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"time": "x", "event": "log"}\n{"event": "log"}\nnull\n7\n')
        file.write(b'{"time": 5, "event": "log", "step": 3, "loss": NaN, "use": [1]}\n')
        file.write(b'{"time": 5, "event": "log", "step": [], "loss": 3}\n')
    assert run.update().curves["loss"] == [(1, 2.0), (2, 1.0)]
    assert read_journal(folder).curves == run.curves  # and so from the start


def test_after_a_resume_the_steps_taken_twice_count_once(write: Write) -> None:
    folder = write(
        here(), step(1, 2.0), step(2, 1.9), {"event": "checkpoint", "step": 2}, step(3, 1)
    )
    write(
        {"event": "end", "state": "interrupted"}, here(step=2, hours=3.0), step(3, 1.0, spent=0.5)
    )
    run = read_journal(folder)
    assert run.curves["loss"] == [(1, 2.0), (2, 1.9), (3, 1.0)]
    assert run.state == "training" and (run.spent, run.hours, run.checkpoints) == (0.5, 3.0, [2])


def test_how_a_run_ended(write: Write) -> None:
    folder = write(here(), step(1, 2.0))
    for state, said in (("interrupted", "interrupted after"), ("budget", "stopped by its budget"),
                        ("failed", "failed after"), ("strange", "ended after")):  # fmt: skip
        write({"event": "end", "state": state})
        run = read_journal(folder)
        assert run.state == state and said in run.sentence()
        assert "no checkpoint to go on from" in run.sentence()
    assert run.over is False  # of what it does not know, nothing is claimed
    write({"event": "end", "state": "trained"})
    assert read_journal(folder).state == "saving"
    (folder / "manifest.json").touch()
    assert read_journal(folder).sentence() == "finished after step 1 of 10"
    (folder / "manifest.json").unlink()
    (folder / JOURNAL).unlink()
    assert run.update().state == "removed" and run.over and "its folder is gone" in run.sentence()


def test_a_process_that_is_no_more_is_told_from_one_that_is_silent(write: Write) -> None:
    old = time.time() - 2 * PATIENCE
    folder = write(here(time=old), step(1, 2.0, time=old))
    silent = read_journal(folder)
    assert silent.state == "silent" and "no sign of life for 12" in silent.sentence()
    assert not silent.over
    write(here(started=psutil.Process().create_time() - 60), step(1, 2.0))  # its number is reused
    gone = read_journal(folder)
    assert gone.state == "gone" and gone.over and "without a word" in gone.sentence()
    write(here(machine="another", pid=1), step(1, 2.0))
    assert read_journal(folder).state == "training"  # who knows


def test_a_journal_begun_anew_is_read_anew(write: Write) -> None:
    folder = write(here(), step(1, 2.0), step(2, 1.0))
    run = read_journal(folder)
    (folder / JOURNAL).unlink()
    write(here(), step(1, 5.0))
    assert run.update().curves["loss"] == [(1, 5.0)]


def test_a_run_from_before_there_were_journals(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.1}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_journal(tmp_path)
    assert run.sentence() == "finished after step 2 of 2" and run.last("eval_loss") == 1.1
    with pytest.raises(GemmateError, match="holds no run"):
        read_journal(tmp_path / "nothing")


def picture(run: Journal, *, width: int = 80, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show_frame(run, Console(file=file, width=width))
    file.seek(0)
    return file.read()


def test_a_frame(write: Write) -> None:
    losses = [step(n, 3 - n / 5, learning_rate=1e-3, use=USE) for n in range(1, 10)]
    folder = write(here(hours=1.0), *losses, {"event": "checkpoint", "step": 8},
                   {"event": "note", "said": "The budget \x1b[31mwill end"})  # fmt: skip
    run = read_journal(folder)
    text = picture(run)
    for said in ("run: training, after step 9 of 10", "90 %", "lowest 1.2000", "0.001", "step 8",
                 "10,000 tokens/s", "15 min 00 s of 1 h 00 min", "2.00 GiB, 4.0 GiB free",
                 "87 % busy, 1.0 of 4.0 GiB", "The budget [31mwill end"):  # fmt: skip
        assert said in text, said
    assert "\x1b" not in text and set("█▁") <= set(text)
    narrow = picture(run, width=30)
    assert max(map(len, narrow.splitlines())) <= 30
    assert picture(run, encoding="ascii").isascii()


def test_a_curve_in_letters() -> None:
    assert chart([(1, 0.0), (2, 1.0)], width=9, height=1) == ["▁█"]
    assert chart([(1, 2.0), (2, 2.0)], width=9, height=2) == ["  ", "▁▁"]
    assert chart([], width=9) == []
    many = chart([(n, float(n % 2)) for n in range(1000)], width=10, height=1)
    assert len(many[0]) == 10 and set(many[0]) <= set(BLOCKS)
    gap = chart([(1, 1.0), (100, 2.0), (101, 3.0)], width=3, height=1)
    assert gap == ["▁ █"]  # no column where no step is
    assert [duration(s) for s in (None, 12.4, 200, 7500)] == [
        "unknown", "12 s", "3 min 20 s", "2 h 05 min",
    ]  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_following_a_run_to_its_end(terminal: bool, write: Write, tmp_path: Path) -> None:
    """It is not there yet when the watch begins, and ends while it goes on."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=60, color_system=None)
    told: list[Journal] = []
    watch = threading.Thread(
        target=lambda: told.append(follow(tmp_path / "run", console, every=0.01)), daemon=True
    )
    watch.start()
    for records in ([here(), step(1, 2.0)], [step(2, 1.0)], [{"event": "end", "state": "budget"}]):
        time.sleep(0.1)
        write(*records)
    watch.join(timeout=30)
    assert not watch.is_alive() and told[0].state == "budget"
    assert "stopped by its budget after step 2 of 10" in " ".join(file.getvalue().split())


def test_no_terminal_obeys_what_stands_in_a_run() -> None:
    assert printable("a\x1b]0;x\x07\n\tb\u202e") == "a]0;x b"
    assert len(printable("x" * 9999)) == 500 and printable(None) == ""


def test_the_page_of_a_run(write: Write, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    losses = [step(n, 3 - n / 50, learning_rate=1e-3, grad_norm=1.0, use=USE) for n in range(1, 61)]
    folder = write(here(name=bad, steps=60), *losses, step(60, 1.8) | {"eval_loss": 1.9},
                   {"event": "checkpoint", "step": 50},
                   {"event": "end", "state": "failed", "said": bad})  # fmt: skip
    text = write_run_page(folder, tmp_path / "deep" / "run.html").read_text("utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "failed after step 60 of 60. Go on with --resume last, from step 50." in text
    assert text.count("<img ") == 5 == text.count("data:image/png;base64,")
    assert (
        text.count('alt="') == 5 and 'alt=""' not in text and "http" not in text.split("<main>")[1]
    )
    assert "Loss over 60 steps: training from 2.98 to 1.8, validation from 1.9 to 1.9" in text
    assert "GPU 0" in text and "87 % busy" in text
    with pytest.raises(GemmateError, match=r"Name it \.html"):
        write_run_page(folder, tmp_path / "run.txt")
    assert smoothed([(n, float(n)) for n in range(1, 31)])[-1] == (30, sum(range(11, 31)) / 20)
