import json
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from printed import printed
from typer.testing import CliRunner

from gemmate_lib import batches, course, headless
from gemmate_lib.batches import Job, check_parameters, plan, read_grid, read_pairs, select
from gemmate_lib.cli import app
from gemmate_lib.config import GemmateError
from gemmate_lib.course import Order, alone, make_folder, newest_order, run_course
from gemmate_lib.headless import NotebookResult, inside, main_metric, run_notebook
from gemmate_lib.storage import FsspecStorage, Mirror

FIGURE = """
import matplotlib
matplotlib.use("Agg")
from matplotlib.figure import Figure
from gemmate_lib.plots import show
figure = Figure(figsize=(1, 1))
show(figure, "An empty figure.", "empty")
"""
WHERE = """
import os
from pathlib import Path
from gemmate_lib.machine import runs_home
(runs_home() / "made").mkdir(parents=True)
print(os.environ["GEMMATE_PROFILE"], os.environ["OMP_NUM_THREADS"], os.environ["HF_HUB_OFFLINE"])
print("main metric: first")
print(f"main metric: {rows} rows")
"""
# A kernel's child in a session of its own is what a kill of one process group would miss.
HANG = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("child.txt", "w").write(str(child.pid))
child.wait()
"""


def write_notebook(folder, name, *sources, parameters="rows = 100", stored=()):
    cells = [{"cell_type": "markdown", "id": "m", "metadata": {}, "source": f"# {name}"}]
    for number, source in enumerate((parameters, *sources)):
        metadata = {} if number else {"tags": ["parameters"]}
        about = {"cell_type": "code", "id": f"c{number}", "metadata": metadata, "source": source}
        cells.append(about | {"execution_count": None, "outputs": list(stored)})
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
    folder.mkdir(exist_ok=True, parents=True)
    content = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (folder / f"{name}.ipynb").write_text(json.dumps(content), encoding="utf-8")
    return folder / f"{name}.ipynb"


def use(monkeypatch, *files):
    monkeypatch.setattr(batches, "NOTEBOOKS", {file.stem[:2]: file for file in files})


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A course in which 03 fails, 04 runs, and 05 depends on 03; and what was printed."""
    folder = tmp_path_factory.mktemp("sources{}")  # papermill would format such a path
    old = {"output_type": "stream", "name": "stdout", "text": "main metric: of the author's run\n"}
    files = (
        write_notebook(folder, "03_sft", "1 / 0", "print('never')", stored=[old]),
        write_notebook(folder, "04_generate", WHERE, FIGURE, ""),
        write_notebook(folder, "05_evaluate", "print('never')"),
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, *files)
        monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecretsecret")
        order = Order(parameters={"rows": "7"})
        return run_course(order, out=folder / "out{}", copy_to="memory://course/run")


def test_the_folder_is_copied_to_its_url(executed):
    there = FsspecStorage("memory://course/run")
    names = {name.removeprefix(f"{there.root}/") for name in there.fs.find(there.root)}
    here = {f.relative_to(executed.directory).as_posix() for f in executed.directory.rglob("*")
            if f.is_file()}  # fmt: skip
    assert names == here and {"report.html", "notebooks/04_generate.ipynb"} <= names
    for name in names:
        assert there.fs.cat_file(f"{there.root}/{name}") == (executed.directory / name).read_bytes()


def test_what_cannot_be_copied_is_said_and_stays(monkeypatch, tmp_path, capsys):
    def refuse(*args):
        raise PermissionError("no such bucket")

    use(monkeypatch, write_notebook(tmp_path, "03_sft", "print('main metric: fine')"))
    monkeypatch.setattr(FsspecStorage, "put", refuse)
    with pytest.raises(GemmateError, match=r"not copied to its URL: no such bucket\..*out"):
        run_course(Order(), out=tmp_path / "out", copy_to="memory://course/refused")
    assert (tmp_path / "out/manifests/03_sft.json").is_file()
    assert "03_sft: ok" in capsys.readouterr().out


def test_an_unknown_url_is_refused_before_anything_runs(three, tmp_path):
    with pytest.raises(GemmateError, match="Cannot write to nowhere://x"):
        run_course(Order(), out=tmp_path / "out", copy_to="nowhere://x")
    assert not (tmp_path / "out").exists()


def test_a_copy_takes_what_is_new_or_changed(tmp_path):
    mirror = Mirror("memory://mirror/run")
    for name in ("a", "deep/b", "running.pid"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1", "utf-8")
    assert mirror.copy(tmp_path) == 2 and mirror.copy(tmp_path) == 0
    (tmp_path / "deep/b").write_text("22", "utf-8")
    assert mirror.copy(tmp_path) == 1
    assert mirror.storage.fs.cat_file(f"{mirror.storage.root}/deep/b") == b"22"
    assert len(mirror.storage.fs.find(mirror.storage.root)) == 2


def test_goes_on_after_a_failure_and_skips_what_depends_on_it(executed):
    assert [result.state for result in executed.notebooks] == ["failed", "ok", "skipped"]
    assert not executed.ok
    assert executed.notebooks[2].skipped == "needs 03_sft, which is failed"
    assert not (executed.directory / "notebooks" / "05_evaluate.ipynb").exists()


def test_tells_cell_and_message_of_an_error_and_no_stored_metric(executed):
    failed = executed.notebooks[0]
    # The cells: the parameters, those injected, the one that fails, and one that is not reached.
    assert failed.error == {"cell": 3, "message": "ZeroDivisionError: division by zero"}
    assert (failed.executed, failed.cells) == (3, 4)
    assert failed.main_metric is None


def test_gives_the_notebook_its_parameters_profile_and_folders(executed):
    result = executed.notebooks[1]
    assert result.main_metric == "7 rows"
    assert (result.executed, result.cells) == (4, 4)
    assert (executed.directory / "runs" / "made").is_dir()
    assert (executed.directory / "figures" / "04_generate" / "empty.png").is_file()
    assert "tiny 1 1" in printed(executed.directory / "notebooks" / "04_generate.ipynb")


def test_writes_manifests_without_token_and_a_report_with_the_figure(executed):
    file = executed.directory / "manifests" / "04_generate.json"
    manifest = json.loads(file.read_text("utf-8"))
    assert manifest["ok"] and manifest["parameters"] == {"rows": 7}
    assert manifest["main_metric"] == "7 rows" and manifest["seconds"] > 0
    assert "An empty figure." in executed.report.read_text("utf-8")
    page = executed.directory / "notebooks" / "04_generate.html"
    assert 'alt="An empty figure."' in page.read_text("utf-8")
    everything = [file for file in executed.directory.rglob("*") if file.is_file()]
    assert not [file for file in everything if b"hf_secret" in file.read_bytes()]


def test_the_executed_notebook_holds_no_absolute_path(executed):
    text = (executed.directory / "notebooks" / "04_generate.ipynb").read_text("utf-8")
    assert str(executed.directory) not in text
    assert str(executed.directory.parent) not in text


def test_the_table_shows_an_error_as_it_is():
    from rich.console import Console

    error = {"cell": 2, "message": "KeyError: [bold]'a'"}
    result = NotebookResult("03_sft", "tiny", {}, error=error)
    console = Console(width=200)
    with console.capture() as said:
        console.print(course.CourseResult(None, (result,), None).table())
    assert "cell 2: KeyError: [bold]'a'" in said.get()
    assert "failed" in said.get()


def test_a_cell_that_hangs_is_ended_with_all_its_processes(tmp_path):
    source = write_notebook(tmp_path, "03_sft", HANG)
    folder, ticks = make_folder(tmp_path / "out"), []
    about = {"profile": "tiny", "tick": lambda **counts: ticks.append(counts)}
    result = run_notebook(Job("03", source, {}, {}), folder, timeouts=(5, 900), **about)
    assert result.state == "failed"
    assert "CellTimeoutError" in result.error["message"] and result.error["cell"] == 2
    assert not psutil.pid_exists(int((folder / "child.txt").read_text()))
    assert {"completed": 2, "total": 2} in ticks


def test_what_takes_too_long_is_ended():
    process = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    ticks = []
    assert headless._wait(process, 1, lambda: ticks.append(process.is_running())) is None
    assert ticks and all(ticks)
    assert not process.is_running()


def test_an_interrupt_ends_what_left_the_process_group_as_well(tmp_path):
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time;"
    code += 'open("ready", "w"); time.sleep(600)\'], start_new_session=True).wait()'
    process, family = psutil.Popen([sys.executable, "-c", code], cwd=tmp_path), []

    def interrupt():
        if (tmp_path / "ready").exists():
            family.extend(process.children())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        headless._wait(process, 120, interrupt)
    assert len(family) == 1
    assert not family[0].is_running() and not process.is_running()


def test_what_a_process_leaves_behind_ends_with_it(tmp_path):
    code = "import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c',"
    code += "'import time; time.sleep(600)'], start_new_session=True); time.sleep(4);"
    code += "open('child', 'w').write(str(child.pid)); os._exit(3)"
    process = psutil.Popen([sys.executable, "-c", code], cwd=tmp_path)
    assert headless._wait(process, 120, lambda: None) == 3
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


def cell(count=1, *outputs):
    return {"execution_count": count, "outputs": list(outputs)}


def raised(name, value):
    return {"output_type": "error", "ename": name, "evalue": value, "traceback": []}


@pytest.mark.parametrize(
    ("cells", "status", "log", "message"),
    [
        ([cell()], 0, "", None),
        ([cell(), cell(None)], 0, "", "ended before its 2 cells were run"),  # sys.exit()
        ([cell(1, raised("SystemExit", "0")), cell(None)], 0, "", "ended before its 2 cells"),
        ([], 0, "", "ended before"),
        ([cell()], None, "", "took too long"),
        ([cell(1, raised("E", "a\n  b"))], 1, "", "E: a b"),
        ([cell()], 1, "nbclient.exceptions.DeadKernelError: Kernel died\n", "DeadKernelError: Ker"),
        (
            [cell(1, raised("KeyboardInterrupt", ""))],
            1,
            "nbclient.exceptions.Slow: 5 s",
            "Slow: 5 s",
        ),
        ([cell()], 1, "", "status 1"),
        ([cell()], 2, "a\nNo such kernel", "No such kernel"),
    ],
)
def test_every_way_to_fail_has_a_message(tmp_path, cells, status, log, message):
    (tmp_path / "log.txt").write_text(log, encoding="utf-8")
    error = headless._error(cells, status, tmp_path / "log.txt")
    assert message in error["message"] if message else error is None


def test_the_main_metric_is_the_last_line_that_says_so():
    text = "main metric: one\nno main metric: two\n main metric: three\n"
    stream = {"output_type": "stream", "text": text}
    parts = {"output_type": "stream", "text": ["main met", "ric: four \n", "x\n"]}
    assert main_metric([cell(1, stream)]) == "one"
    assert main_metric([cell(1, stream), cell(2, parts)]) == "four"
    assert main_metric([cell(1, raised("E", ""))]) is None


def test_a_half_written_notebook_has_no_cells_yet(tmp_path):
    (tmp_path / "a.ipynb").write_text('{"cells": [', encoding="utf-8")
    assert headless.code_cells(tmp_path / "a.ipynb") == []
    assert headless.code_cells(tmp_path / "b.ipynb") == []


@pytest.fixture
def three(monkeypatch, tmp_path):
    files = (
        write_notebook(tmp_path, "00_setup", parameters="rows = 1\nseed: int = 0"),
        write_notebook(tmp_path, "03_sft", parameters="max_steps = 20\nrows = 1"),
        write_notebook(tmp_path, "07_time", parameters="rows = 1"),
    )
    use(monkeypatch, *files)
    return files


def test_select_takes_the_core_or_what_is_named(three):
    assert list(select()) == ["00", "03"]
    assert list(select(["all"])) == ["00", "03", "07"]
    assert list(select(["7", "03_sft", "03"])) == ["03", "07"]
    assert list(select(["03_sft.ipynb"])) == ["03"]
    with pytest.raises(GemmateError, match="03_sft"):
        select(["03_stf"])


@pytest.mark.slow
def test_all_runs_the_electives_too(three, tmp_path):
    words = ["course", "--all", "--jobs", "2", "--out", str(tmp_path / "out")]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert {f.name for f in three} == {f.name for f in (tmp_path / "out").rglob("*.ipynb")}


def test_a_parameter_goes_where_it_is_known(three):
    given = check_parameters({"max_steps": 5, "rows": 2}, select(["all"]))
    assert given == {"00": {"rows": 2}, "03": {"max_steps": 5, "rows": 2}, "07": {"rows": 2}}


def test_an_unknown_parameter_is_refused_before_anything_runs(three, tmp_path):
    with pytest.raises(GemmateError, match=r"'max_step'.*Known are: max_steps, rows, seed"):
        run_course(Order(parameters={"max_step": 5}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_notebook_without_the_tag_takes_no_parameters(monkeypatch, tmp_path):
    file = write_notebook(tmp_path, "03_sft")
    file.write_text(file.read_text("utf-8").replace('"parameters"', '"other"'), encoding="utf-8")
    use(monkeypatch, file)
    with pytest.raises(GemmateError, match="no cell is tagged"):
        check_parameters({"rows": 5}, select())


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("max_steps", "many", "int"), ("max_steps", "1.5", "int"), ("rate", "fast", "float")],
)
def test_a_parameter_of_a_wrong_type_is_refused(monkeypatch, tmp_path, name, value, kind):
    cell = "max_steps = 20\nrate = 1e-3\nseed: int = None\nmodel: str = None"
    use(monkeypatch, write_notebook(tmp_path, "03_sft", parameters=cell))
    with pytest.raises(GemmateError, match=f"{name} takes {kind}, not '{value}'"):
        check_parameters({name: value}, select())
    texts = {"max_steps": "5", "rate": "1e-4", "seed": "null", "model": "7"}
    typed = {"max_steps": 5, "rate": 1e-4, "seed": None, "model": "7"}
    assert check_parameters(texts, select()) == {"03": typed}


def test_a_grid_has_a_job_for_every_point(three):
    grid = read_grid(["max_steps=1,2", "rows=3,4"])
    jobs = plan(["00", "03"], {"seed": "9"}, grid)
    assert [job.name for job in jobs] == [
        "00_setup--rows=3",
        "03_sft--max_steps=1--rows=3",
        "00_setup--rows=4",
        "03_sft--max_steps=1--rows=4",
        "03_sft--max_steps=2--rows=3",
        "03_sft--max_steps=2--rows=4",
    ]
    assert jobs[0].parameters == {"rows": 3, "seed": 9}
    assert jobs[0].fits(jobs[1]) and not jobs[0].fits(jobs[3])
    assert Job("03", three[1], {}, {"model": "../a b/{c}"}).name == "03_sft--model=.._a_b_c_"


@pytest.mark.parametrize("pairs", [["lora_r"], ["=4"], ["rows=1", "rows=2"]])
def test_a_malformed_grid_is_refused(pairs):
    with pytest.raises(GemmateError):
        read_grid(pairs)


def test_a_parameter_is_not_in_the_grid_as_well(three):
    with pytest.raises(GemmateError, match="rows is both"):
        plan([], {"rows": "1"}, {"rows": ["2", "3"]})
    assert read_pairs(["a=b=c"], "") == {"a": "b=c"}


SOMETIMES = "assert max_steps != 2 or rows != 3, 'planted'\nprint('main metric: fine')"


@pytest.mark.slow
def test_a_grid_outlives_a_failure_and_is_resumed(monkeypatch, tmp_path):
    cell = "max_steps = 20\nrows = 1"
    file = write_notebook(tmp_path, "03_sft", SOMETIMES, parameters=cell)
    use(monkeypatch, file)
    order = Order(grid=read_grid(["max_steps=1,2", "rows=3,4"]), jobs=2)
    first = run_course(order, out=tmp_path / "out")
    assert [r.state for r in first.notebooks] == ["ok", "ok", "failed", "ok"]
    assert not first.ok and "planted" in first.notebooks[2].remark
    page = first.report.read_text("utf-8")
    assert page.count("fine") >= 3 and "planted" in page

    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out/manifests").iterdir()}
    again, folder = newest_order(tmp_path / "out")
    assert again.grid == order.grid and folder == tmp_path / "out"
    second = run_course(again, out=folder, resume=True)
    changed = {
        f.name
        for f in (tmp_path / "out/manifests").iterdir()
        if before[f.name] != f.stat().st_mtime_ns
    }
    assert changed == {"03_sft--max_steps=2--rows=3.json"}
    assert second.notebooks[:2] == first.notebooks[:2] and not second.ok

    write_notebook(tmp_path, "03_sft", "print('main metric: other')", parameters=cell)
    mended = run_course(again, out=folder, resume=True)  # another notebook: nothing is kept
    assert mended.ok and {r.main_metric for r in mended.notebooks} == {"other"}


def test_there_has_to_be_something_to_resume(monkeypatch, tmp_path):
    monkeypatch.setenv("GEMMATE_RUNS", str(tmp_path))
    for out in (None, tmp_path / "nowhere"):
        with pytest.raises(GemmateError, match="no run of the course to resume"):
            newest_order(out)


def test_two_courses_do_not_share_a_folder(tmp_path):
    folder = make_folder(tmp_path / "out")
    with alone(folder), pytest.raises(GemmateError, match="Another course runs"), alone(folder):
        pass
    process = psutil.Popen([sys.executable, "-c", "pass"])
    process.wait()
    (folder / "running.pid").write_text(str(process.pid))  # it was killed and left this
    with alone(folder):
        assert (folder / "running.pid").exists()
    assert not (folder / "running.pid").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GemmateError, match="Choose another folder"):
        make_folder(tmp_path / "file/out")


def test_an_interrupt_ends_the_notebooks_that_run(monkeypatch, tmp_path):
    hangs = write_notebook(tmp_path, "03_sft", HANG)
    waits = write_notebook(tmp_path, "04_late", "open('late.txt', 'w').write('')")
    use(monkeypatch, hangs, waits)
    out = tmp_path / "out"

    def interrupt():
        while not (out / "child.txt").exists() or not (out / "child.txt").read_text():
            time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_course(Order(jobs=1), out=out)
    assert not psutil.pid_exists(int((out / "child.txt").read_text()))
    assert not (out / "late.txt").exists() and not (out / "running.pid").exists()


@pytest.mark.parametrize(
    "secret", [{"rows": "hf_abcdefghijklmnopqrst"}, {"hf_token": "x"}, {"rows": ["hf_" + "a" * 30]}]
)
def test_a_secret_is_no_parameter_and_is_not_repeated(three, secret):
    with pytest.raises(GemmateError, match="HF_TOKEN") as refused:
        check_parameters(secret, select())
    assert "hf_a" not in str(refused.value)


def test_max_new_tokens_is_no_secret(monkeypatch, tmp_path):
    use(monkeypatch, write_notebook(tmp_path, "03_sft", parameters="max_new_tokens = 1"))
    assert check_parameters({"max_new_tokens": 8}, select()) == {"03": {"max_new_tokens": 8}}


def test_an_unknown_profile_is_refused(three):
    with pytest.raises(GemmateError, match="'tiny'"):
        run_course(Order(profile="tinny"))


def test_the_tiny_profile_alone_is_offline_and_single_threaded(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert headless.environment(tmp_path, "tiny", "a")["HF_HUB_OFFLINE"] == "1"
    assert not {"HF_HUB_OFFLINE", "OMP_NUM_THREADS"} & set(
        headless.environment(tmp_path, "t4", "a")
    )


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "notebooks").mkdir()
    with pytest.raises(GemmateError, match="something else"):
        make_folder(tmp_path)


def test_an_earlier_run_is_taken_up_again(tmp_path):
    assert make_folder(make_folder(tmp_path / "out")) == tmp_path / "out"


def test_runs_are_kept_apart_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMATE_RUNS", str(tmp_path))
    first, second = make_folder(None), make_folder(None)
    assert first.parent == second.parent == tmp_path / "course"
    assert first != second


def test_a_path_that_leaves_the_folder_is_refused(tmp_path):
    folder = make_folder(tmp_path / "out")
    (folder / "figures" / "03_sft").symlink_to(tmp_path)
    for name in ("../a", "notebooks/../../a", "/etc", "figures/03_sft"):
        with pytest.raises(GemmateError, match="not inside"):
            inside(folder, name)
    assert inside(folder, "notebooks/../logs") == folder / "logs"


def test_a_linked_part_of_the_folder_is_refused(tmp_path):
    folder = make_folder(tmp_path / "out")
    (folder / "notebooks").rmdir()
    (folder / "notebooks").symlink_to(tmp_path)
    with pytest.raises(GemmateError, match="not inside"):
        make_folder(folder)


def test_importing_the_course_is_light():
    code = "import sys, gemmate_lib.course; print([m for m in ('torch', 'papermill', 'nbformat', "
    code += "'matplotlib', 'jinja2') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_a_metric_that_the_kernel_split_is_read_whole():
    pieces = [{"output_type": "stream", "name": "stdout", "text": text}
              for text in (["first\n", "main metric:"], " 7 rows\n")]  # fmt: skip
    assert main_metric([{"outputs": pieces}, {"outputs": []}]) == "7 rows"
