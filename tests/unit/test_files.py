"""The files around the code agree with each other."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOCK = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if line and not line.startswith(("#", " "))
]


def wanted() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    names = PROJECT["dependencies"] + [name for extra in extras for name in extra]
    found = [Requirement(name) for name in names]
    return [each for each in found if each.name != PROJECT["name"]]  # dev takes extras of its own


def test_the_lock_satisfies_the_project_on_every_python() -> None:
    for python in ("3.11", "3.12", "3.13"):
        where = default_environment() | {
            "python_version": python, "python_full_version": f"{python}.0"
        }  # fmt: skip
        locked = {
            pin.name.lower().replace("_", "-"): pin
            for pin in LOCK
            if pin.marker is None or pin.marker.evaluate(where)
        }
        for requirement in wanted():
            pin = locked[requirement.name.lower().replace("_", "-")]
            version = next(iter(pin.specifier)).version
            assert requirement.specifier.contains(version), f"{requirement} on {python}: {pin}"


def test_one_torch_for_cpu_and_cuda() -> None:
    pin = next(p for p in LOCK if p.name == "torch")
    assert pin.specifier.contains("2.13.0+cpu") and pin.specifier.contains("2.13.0+cu130")


def test_environment_yml_installs_the_lock_and_the_project() -> None:
    found = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python = next(d for d in found["dependencies"] if str(d).startswith("python="))
    assert PROJECT["requires-python"].startswith(f">={python.removeprefix('python=')}")
    pip = next(d["pip"] for d in found["dependencies"] if isinstance(d, dict))
    assert pip == ["-c constraints.txt", "-e .[notebook,dev]"]
    jupyter = next(d for d in found["dependencies"] if str(d).startswith("jupyterlab="))
    locked = next(p for p in LOCK if p.name == "jupyterlab")
    assert next(iter(locked.specifier)).version.startswith(jupyter.removeprefix("jupyterlab="))


def test_no_path_of_a_machine_and_no_token() -> None:
    bad = re.compile(r"(/home/\w+/|/root/|/Users/\w+/|hf_[A-Za-z0-9]{30,})")
    for file in ROOT.rglob("*"):
        inside = file.relative_to(ROOT).parts
        if inside[0] in (".git", ".venv", "runs", "build", "dist") or not file.is_file():
            continue
        if file.suffix in (".py", ".md", ".ipynb", ".yml", ".yaml", ".toml", ".txt", ".json"):
            found = bad.search(file.read_text("utf-8"))
            assert not found or inside[0] == "tests", f"{file}: {found}"
