"""The repository around the code: links lead somewhere, nothing is large, the hooks exist."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAX_BYTES = 6_000_000
LINK = re.compile(r"\]\((?!https?://|mailto:|data:)([^)\s]+)\)")
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{34}|ghp_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}")


def tracked() -> list[Path]:
    """The files of the repository."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("this is no git checkout")
    names = done.stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def markdown(path: Path) -> str:
    """The Markdown of a file, or of a notebook's cells."""
    if path.suffix == ".md":
        return path.read_text("utf-8")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(path: Path) -> list[str]:
    """The relative links of a file that lead nowhere."""
    text, dead = markdown(path), []
    for link in LINK.findall(text):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(markdown(target))):
            dead.append(f"{path.name}: {link}")
    return dead


def test_every_relative_link_leads_somewhere() -> None:
    pages = [path for path in tracked() if path.suffix in (".md", ".ipynb")]
    assert len(pages) > 15
    assert [dead for page in pages for dead in dead_links(page)] == []


def test_a_dead_link_is_reported(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title, here\n[a](page.md) [b](gone.md) [c](#a-title-here) [d](#gone)\n")
    assert dead_links(page) == ["page.md: gone.md", "page.md: #gone"]


def test_no_file_is_large_and_none_holds_a_token() -> None:
    files = tracked()
    assert [path.name for path in files if path.stat().st_size > MAX_BYTES] == []
    assert [path.name for path in files if TOKEN.search(path.read_bytes())] == []


def test_the_address_of_the_repository_stands_in_one_place() -> None:
    """Badges and install cells are stamped from it; no other file repeats it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    address = project["urls"]["Repository"].removeprefix("https://github.com/").encode()
    others = [
        path for path in tracked() if path.suffix != ".ipynb" and address in path.read_bytes()
    ]
    assert [path.name for path in others] == ["pyproject.toml"]


def test_every_hook_has_its_program_in_the_lock() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0][
        "hooks"
    ]
    assert {"ruff", "notebooks", "secrets", "spelling", "repository"} <= {h["id"] for h in hooks}
    lock = (ROOT / "constraints.txt").read_text("utf-8")
    package = {"lint-imports": "import-linter", "detect-secrets-hook": "detect-secrets"}
    for hook in hooks:
        program, *arguments = hook["entry"].split()
        name = Path(program).name
        assert program.startswith(".venv/bin/")
        assert name == "python" or f"{package.get(name, name)}==" in lock
        assert all((ROOT / a).is_file() for a in arguments if a.endswith(".py"))


def test_the_workflow_runs_what_the_readme_says() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]
    matrix = jobs["locked"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"] and len(matrix["os"]) == 2
    assert any(step.get("run") == "make test" for step in jobs["locked"]["steps"])
    assert jobs["newest"]["continue-on-error"]
    assert any("gemmate course" in step.get("run", "") for step in jobs["newest"]["steps"])
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text("utf-8"))


def test_the_readmes_table_of_encodings_is_the_measured_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from temporal_report import failures, readme_tables

    found = json.loads((ROOT / "benchmarks/temporal.json").read_text("utf-8"))
    readme = (ROOT / "README.md").read_text("utf-8")
    for name, table in readme_tables(found).items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in readme
    assert failures(found) == []
    worse = json.loads(json.dumps(found))
    for run in worse["headline"].values():
        run["exact_match"]["held-out years, before 2006"]["time"] = 0.98
    for arm in ("calendar", "era"):
        worse["language"]["drift"]["gain"][f"{arm}, true against none, true"] = [-0.1, -0.3, 0.1]
    said = "\n".join(failures(worse))
    assert "time 0.980 in held-out years, before 2006, required 0.99" in said
    assert "drift: calendar, true against none, true shows no gain" in said
