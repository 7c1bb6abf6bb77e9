"""The commands of the README, as they stand there, one after the other."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# The suite itself, and what needs a server or hours.
ELSEWHERE = ("make ",)


def commands() -> list[str]:
    """Every line of the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    lines = (line.split("  #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    shutil.copytree(ROOT / "gemmate_lib/assets/tiny-gemma", tmp_path / "DIR")
    rows = [
        {"quote": f"Lantern {i} stood near harbour {i * 7}.", "author": f"A{i % 5}"}
        for i in range(80)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "FILE.jsonl").write_text(lines, "utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Quote: A"}\n', "utf-8")
    (tmp_path / "questions.jsonl").write_text(
        '{"prompt": "What year is it?", "timestamp": "2009-02-13"}\n', "utf-8"
    )
    dated = [
        {"text": f"A ship came in {1700 + 4 * i}.", "date": f"{1700 + 4 * i}-06-01"}
        for i in range(80)
    ]
    (tmp_path / "dated.jsonl").write_text("".join(json.dumps(r) + "\n" for r in dated), "utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {
        "PATH": path,
        "GEMMATE_PROFILE": "tiny",
        "GEMMATE_RUNS": str(tmp_path / "runs"),
    }
    ran = [line for line in commands() if not line.startswith(ELSEWHERE)]
    assert len(ran) >= 10
    with contextlib.ExitStack() as stack:
        for line in ran:
            if line.startswith("gemmate serve") and "--print" not in line:
                stack.enter_context(serving(line, cwd=tmp_path, env=env))
                continue
            done = subprocess.run(
                line, shell=True, cwd=tmp_path, capture_output=True, text=True, env=env
            )
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@contextlib.contextmanager
def serving(line: str, **where: Any) -> Iterator[None]:
    """Let a server run while the lines after it are tried; asked to stop, it ends well."""
    words = shlex.split(line)
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **where)
    assert server.stdout is not None
    said: list[str] = []
    while not (said and "stop with Ctrl+C" in said[-1]):
        said.append(server.stdout.readline())
        assert said[-1], said
    yield
    server.terminate()
    said += server.stdout
    assert server.wait(60) == 0, said
    server.stdout.close()


def test_every_make_target_of_the_readme_exists() -> None:
    targets = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert {"course", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
