"""The whole course, kernels included, where there is no network, and with a token at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import canary
import offline
import pytest
from printed import printed

ROOT = Path(__file__).parents[2]
TOKENS = canary.make_token(3), canary.make_token(4)
TRACKED = {"tracking.tracker": "tensorboard", "training.max_steps": 2, "checkpoint.save_every": 1,
           "dataset.limit": 20, "generation.max_new_tokens": 2}  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not offline.possible(), reason="this system forbids network namespaces"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the course was run, and a run with a tracker: all that both wrote, caches included."""
    home = tmp_path_factory.mktemp("home")
    env = os.environ | canary.in_an_environment(home, TOKENS)
    words = [word for pair in TRACKED.items() for word in ("--set", "{}={}".format(*pair))]
    for number, command in enumerate(
        (
            ["course", "--profile", "tiny", "--out", home / "course"],
            ["finetune", "quotes", "--profile", "tiny", "--out", home / "run", *words],
        )
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "tests/offline.py", sys.executable, "-m", "gemmate_lib",
             *command],
            capture_output=True, text=True, cwd=ROOT, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (home / f"said-{number}.txt").write_text(done.stdout + done.stderr, "utf-8")
    return home


def test_the_course_runs_without_a_network(home: Path) -> None:
    out = home / "course"
    records = [json.loads(file.read_text("utf-8")) for file in (out / "manifests").glob("*.json")]
    assert len(records) >= 7
    assert (out / "report.html").is_file() and list((out / "figures").rglob("*.png"))


def test_no_file_holds_the_token_that_was_at_hand(home: Path) -> None:
    """Whole or in part, also in base64: in notebooks, manifests, logs, reports, a tracker's files.

    That what is searched for would be found is shown in tests/faults/test_security.py.
    """
    assert "token: environment" in printed(home / "course/notebooks/00_setup.ipynb")
    assert next((home / "run").rglob("events.out.tfevents.*")).stat().st_size > 1000
    named = dict(zip(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), TOKENS, strict=True))
    assert not list(canary.leaks(home, named))
