"""The registry: versions that are what was added, tags with a history, and what is refused."""

import json
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import make_run
from test_checkpoints import flip

from gemmate_lib import cli_registry
from gemmate_lib.config import GemmateError, ModelConfig
from gemmate_lib.registry import Registry
from gemmate_lib.sft import Run, load_run
from gemmate_lib.tags import Tag, check_tag, moved, read_tag
from gemmate_lib.versions import BadVersion


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Three runs with other manifests, and so three versions; the first one was evaluated."""
    first = tmp_path_factory.mktemp("runs") / "0"
    make_run(first, ModelConfig(), "Quote: A")
    folders = [first, *(first.with_name(name) for name in "12")]
    for folder in folders[1:]:
        shutil.copytree(first, folder)
        record = json.loads((folder / "manifest.json").read_text("utf-8"))
        record["timings"] = {"train": float(folder.name)}
        (folder / "manifest.json").write_text(json.dumps(record), "utf-8")
    half = {"value": 0.5, "low": None, "high": 0.75, "n": 8}
    measured = {"metrics": {"author_accuracy": half, "html": half}}
    (first / "metrics.json").write_text(json.dumps(measured), "utf-8")
    return [load_run(folder) for folder in folders]


@pytest.fixture(params=["memory", "folder"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    url = f"memory://{tmp_path.name}/models" if request.param == "memory" else f"{tmp_path}/models"
    yield Registry(url)


@pytest.fixture
def folder(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


def test_a_run_goes_in_once_and_comes_back(
    registry: Registry, runs: list[Run], tmp_path: Path
) -> None:
    assert registry.versions.names() == [] and registry.tags() == {}
    version = registry.versions.add(runs[0])
    assert registry.versions.add(runs[0]) == version
    assert registry.versions.names() == [version.digest]
    assert version.experiment == runs[0].experiment
    assert [f"{name} {x}" for name, x in version.metrics.items()] == [
        "author_accuracy 0.500 [-inf, 0.75] (n=8)"
    ]
    back = load_run(registry.versions.fetch(version, tmp_path / "cache"))
    assert back.manifest == runs[0].manifest
    for file in runs[0].adapter.iterdir():
        assert (back.adapter / file.name).read_bytes() == file.read_bytes()
    assert not (back.directory / "metrics.json").exists()  # the hash does not cover it


def test_what_is_in_the_cache_is_verified(
    folder: Registry, runs: list[Run], tmp_path: Path
) -> None:
    version, cache = folder.versions.add(runs[0]), tmp_path / "cache"
    fetched = folder.versions.fetch(version, cache)
    flip(fetched / "adapter" / "adapter_model.safetensors")
    (fetched / "adapter" / "adapter_model.bin").write_text("planted")
    shutil.copytree(folder.place.at("versions"), tmp_path / "kept")
    assert folder.versions.fetch(version, cache) == fetched
    assert load_run(fetched).manifest == runs[0].manifest
    assert not (fetched / "adapter" / "adapter_model.bin").exists()
    shutil.rmtree(folder.place.at("versions"))  # a sound one needs no registry
    assert folder.versions.fetch(version, cache) == fetched


@pytest.mark.parametrize(
    "file", ["manifest.json", "adapter/adapter_model.safetensors", "version.json"]
)
def test_an_altered_version_is_refused_and_mended(
    file: str, folder: Registry, runs: list[Run], tmp_path: Path
) -> None:
    version = folder.versions.add(runs[0])
    place = Path(folder.place.at("versions", version.digest))
    if file == "version.json":
        text = (place / file).read_text("utf-8")
        digest = version.files["adapter/adapter_model.safetensors"]
        (place / file).write_text(text.replace(digest, "0" * 64), "utf-8")
    else:
        flip(place / file)
    with pytest.raises(BadVersion, match=version.digest[:12]):
        folder.move("production", version.digest, seen=None)
    with pytest.raises(BadVersion, match=r"altered|not what was added"):
        folder.versions.fetch(folder.find(version.digest[:6]), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*")) and folder.tags() == {}
    assert folder.versions.add(runs[0]).files == version.files
    assert folder.versions.fetch(version, tmp_path / "cache").is_dir()
    assert len(list(place.parent.iterdir())) == 1  # nothing is left of the damaged one


def test_an_upload_that_was_cut_off_is_no_version(
    registry: Registry, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sent = type(registry.place.fs).put_file, []

    def cut(self: Any, here: str, there: str, **options: Any) -> Any:
        sent.append(there)
        if len(sent) == 3:
            raise ConnectionError("cut")
        return real(self, here, there, **options)

    with monkeypatch.context() as patched:
        patched.setattr(type(registry.place.fs), "put_file", cut)
        with pytest.raises(GemmateError, match="Cannot write to the registry: cut"):
            registry.versions.add(runs[0])
    if registry.place.local:
        assert registry.place.names("versions") == []
    for name in registry.versions.names():  # in a bucket half of one may lie there
        with pytest.raises(BadVersion, match="never finished"):
            registry.find(name[:8])
    version = registry.versions.add(runs[0])
    assert registry.versions.verify(version.digest) == version


@pytest.mark.parametrize(
    "name",
    ["../outside", "adapter/../../outside", "/etc/hostname", "adapter/adapter_model.bin",
     "adapter/sub/model-1-of-2.safetensors", "adapter\\x.json", "model/modeling.py",
     "adapter/model-..\\..-of-1.safetensors"],
)  # fmt: skip
def test_a_list_of_files_that_leads_elsewhere(name: str, folder: Registry, tmp_path: Path) -> None:
    """An own digest is no proof: who writes the registry can make a record that fits itself."""
    import hashlib

    from gemmate_lib.settings import digest

    manifest = b"{}"
    files = {name: "0" * 64, "manifest.json": hashlib.sha256(manifest).hexdigest()}
    place = Path(folder.place.at("versions", digest(files)))
    place.mkdir(parents=True)
    (place / "manifest.json").write_bytes(manifest)
    record = {"digest": digest(files), "files": files, "note": {"added": "now"}}
    (place / "version.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(BadVersion, match="list of files was altered"):
        folder.versions.read(digest(files))


@pytest.mark.parametrize("name", ["adapter_model.bin", "evil.py", "deep/adapter_config.json"])
def test_a_run_with_what_is_no_part_of_it(
    name: str, folder: Registry, runs: list[Run], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(runs[0].directory, tmp_path / "run"))
    (copy / "adapter" / name).parent.mkdir(exist_ok=True)
    (copy / "adapter" / name).write_text("planted")
    with pytest.raises(GemmateError, match="is no part of a run"):
        folder.versions.add(load_run(copy))


def test_a_link_and_a_run_without_weights(
    folder: Registry, runs: list[Run], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(runs[0].directory, tmp_path / "run"))
    weights, secret = copy / "adapter" / "adapter_model.safetensors", tmp_path / "secret"
    weights.rename(secret)
    with pytest.raises(GemmateError, match="holds no weights"):
        folder.versions.add(load_run(copy))
    weights.symlink_to(secret)
    with pytest.raises(GemmateError, match="is not inside"):
        folder.versions.add(load_run(copy))
    assert folder.versions.names() == []


def test_a_list_shows_no_control_characters() -> None:
    row = {"version": "0" * 64, "experiment": "x", "method": "lora", "base": "a\x1b[2Jb\n",
           "made": "", "tags": [], "metrics": {}}  # fmt: skip
    (line,) = cli_registry._told_of(row)
    assert line.isprintable() and "a?[2Jb?" in line


# Tags


def test_tags_move_and_roll_back(registry: Registry, runs: list[Run]) -> None:
    a, b, c = (registry.versions.add(run).digest for run in runs)
    seen = None
    for version in (a, b, c):
        seen = registry.move("production", version, seen=seen, why=f"why {version[:4]}")
    assert registry.move("production", c, seen=seen) == seen  # no move, nothing recorded
    assert registry.find("production").digest == c == registry.find(c[:4]).digest
    assert registry.rollback("production", why="slow").version == b
    assert registry.rollback("production").version == a  # again: one further back
    with pytest.raises(GemmateError, match="no version before"):
        registry.rollback("production")
    tag = registry.tag("production")
    assert tag and [(m.act, m.before, m.to) for m in tag.moves] == [
        ("tag", None, a), ("tag", a, b), ("tag", b, c), ("rollback", c, b), ("rollback", b, a),
    ]  # fmt: skip
    assert tag.moves[3].why == "slow" and "@" in tag.moves[3].who and "T" in tag.moves[3].when
    registry.move("production", c, seen=tag)  # forward again by name
    assert registry.rollback("production").version == a  # b was rolled back from
    assert registry.tags().keys() == {"production"}


def test_a_move_from_where_the_tag_no_longer_is(registry: Registry, runs: list[Run]) -> None:
    a, b = (registry.versions.add(run).digest for run in runs[:2])
    seen = registry.move("candidate", a, seen=None)
    with pytest.raises(GemmateError, match=f"moved to {a[:12]} meanwhile"):
        registry.move("candidate", b, seen=None)
    registry.move("candidate", b, seen=seen)
    with pytest.raises(GemmateError, match=f"moved to {b[:12]} meanwhile"):
        registry.move("candidate", a, seen=seen)


def test_another_who_writes_at_the_same_moment_is_seen(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be locked: the other's file comes between ours and our look at it."""
    registry = Registry(f"memory://{tmp_path.name}/models")
    a, b = (registry.versions.add(run).digest for run in runs[:2])
    real = type(registry.place.fs).pipe_file

    def late(self: Any, path: str, value: bytes, **options: Any) -> None:
        real(self, path, value, **options)
        real(self, path, value.replace(a.encode(), b.encode()), **options)

    monkeypatch.setattr(type(registry.place.fs), "pipe_file", late)
    with pytest.raises(GemmateError, match="at the same moment"):
        registry.move("production", a, seen=None)


def _mover(url: str, digests: list[str], start: Any, told: Any) -> None:
    registry = Registry(url)
    start.wait()
    for turn in range(12):
        for _ in range(1000):
            try:
                to = digests[turn % 2]
                before = registry.tag("shared")
                after = registry.move("shared", to, seen=before, why=f"{digests[0]} {turn}")
                told.put(len(after.moves) if after != before else 0)
                break
            except GemmateError as error:
                assert "meanwhile" in str(error)


def test_two_processes_lose_no_move(folder: Registry, runs: list[Run]) -> None:
    digests = [folder.versions.add(run).digest for run in runs[:2]]
    context = multiprocessing.get_context("fork")
    start, told = context.Barrier(2), context.Queue()
    both = [
        context.Process(target=_mover, args=(folder.place.root, order, start, told))
        for order in (digests, digests[::-1])
    ]
    for process in both:
        process.start()
    counts = [told.get(timeout=120) for _ in range(24)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    tag = folder.tag("shared")
    assert tag and len(tag.moves) == sum(count > 0 for count in counts)
    assert [m.before for m in tag.moves] == [None, *(m.to for m in tag.moves[:-1])]


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "", "A", "a", "..", "beef", "0123", "x" * 41, "a\n", "x.json", "-a", "é"],
)
def test_names_of_tags(name: str, folder: Registry) -> None:
    with pytest.raises(GemmateError, match="is no name for a tag"):
        folder.tag(name)
    with pytest.raises(GemmateError):
        folder.move(name, "0" * 64, seen=None)
    assert not Path(folder.place.root).exists()


def test_versions_that_cannot_be_found(folder: Registry, runs: list[Run]) -> None:
    version = folder.versions.add(runs[0])
    twin = version.digest[:8] + "0" * 56
    shutil.copytree(folder.place.at("versions", version.digest), folder.place.at("versions", twin))
    for name, said in [
        (version.digest[:8], f"2 versions begin with {version.digest[:8]}"),
        ("0" * 64, "No version begins"),
        ("staging", "There is no tag staging. The registry has: none"),
        ("../x", "names no version"),
        (version.digest[:3], "no tag|names no version"),
    ]:
        with pytest.raises(GemmateError, match=said):
            folder.find(name)
    with pytest.raises(BadVersion, match="list of files was altered"):
        folder.find(twin)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"name": "candidate", "moves": []}', "\xff",
     '{"name": "candidate", "moves": [{"act": "rollback", "to": "%s", "before": null, "when": "",'
     ' "who": "", "why": ""}]}' % ("0" * 64)],
)  # fmt: skip
def test_a_damaged_tag_is_refused(text: str, folder: Registry) -> None:
    path = Path(folder.place.at("tags", "candidate.json"))
    path.parent.mkdir(parents=True)
    path.write_text(text, "latin-1")
    with pytest.raises(GemmateError, match="tag candidate is damaged"):
        folder.tag("candidate")


def test_a_tags_file_under_another_name() -> None:
    tag = moved(None, "candidate", to="0" * 64, act="tag", why="", evidence={})
    assert read_tag("candidate", tag.model_dump_json()) == tag
    with pytest.raises(GemmateError, match="it is that of 'candidate'"):
        read_tag("production", tag.model_dump_json())
    assert isinstance(tag, Tag) and check_tag("pre-release-2") == "pre-release-2"


def test_places_that_cannot_be(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(GemmateError, match="nowhere://x"):
        Registry("nowhere://x")
    file = tmp_path / "file"
    file.write_text("no folder")
    for place in (file, file / "below"):
        with pytest.raises(GemmateError, match=r"Cannot (read|write to) the registry"):
            Registry(place).versions.add(runs[0])


def test_a_folder_that_may_not_be_written(
    folder: Registry, runs: list[Run], tmp_path: Path
) -> None:
    import os

    version = folder.versions.add(runs[0])
    folder.move("production", version.digest, seen=None)
    root = Path(folder.place.root)
    if os.access("/", os.W_OK):
        pytest.skip("this user may write everywhere")
    for path in (root, root / "versions", root / "tags"):
        path.chmod(0o555)
    try:
        assert folder.find("production") == version
        with pytest.raises(GemmateError, match=r"Cannot write to the registry: .*ermission"):
            folder.versions.add(runs[1])
    finally:
        for path in (root, root / "versions", root / "tags"):
            path.chmod(0o755)
