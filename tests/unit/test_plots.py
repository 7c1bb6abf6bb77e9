import matplotlib as mpl
import pytest

from gemmate_lib.config import GemmateError
from gemmate_lib.plots import COLOURS, show, style

mpl.use("Agg")


@pytest.fixture
def shown(monkeypatch):
    """What was displayed."""
    images = []
    monkeypatch.setattr("IPython.display.display", images.append)
    monkeypatch.delenv("GEMMATE_FIGURES", raising=False)
    return images


@pytest.fixture
def figure():
    import matplotlib.pyplot as plt

    with mpl.rc_context():
        style()
        figure, axes = plt.subplots()
        axes.plot([1, 2, 3], [3, 1, 2], label="loss")
        yield figure
    plt.close("all")


def test_shows_a_closed_png_with_its_alt_text(shown, figure):
    import matplotlib.pyplot as plt

    show(figure, "The loss falls, then rises.")
    data, metadata = shown[0]._repr_png_()
    assert data.startswith("iVBORw0KGgo")  # a PNG's magic number in base64
    assert metadata == {"alt": "The loss falls, then rises."}
    assert repr(shown[0]) == "<IPython.core.display.Image object>"  # what nbval compares
    assert not plt.get_fignums()


def test_the_same_figure_has_the_same_bytes_and_no_version_in_them(shown, figure):
    show(figure, "A line.")
    show(figure, "A line.")
    assert shown[0].data == shown[1].data
    assert b"Matplotlib" not in shown[0].data


def test_writes_the_file_only_where_a_folder_is_named(shown, figure, tmp_path, monkeypatch):
    show(figure, "A line.", "loss")
    monkeypatch.setenv("GEMMATE_FIGURES", str(tmp_path / "figures"))
    show(figure, "A line.")
    assert not (tmp_path / "figures").exists()
    show(figure, "A line.", "loss")
    assert (tmp_path / "figures" / "loss.png").read_bytes() == shown[-1].data


@pytest.mark.parametrize("name", ["../loss", "a/loss", "/loss", "..\\loss", ".."])
def test_refuses_a_name_that_leaves_the_folder(shown, figure, tmp_path, monkeypatch, name):
    monkeypatch.setenv("GEMMATE_FIGURES", str(tmp_path / "figures"))
    with pytest.raises(GemmateError, match="no plain name"):
        show(figure, "A line.", name)
    assert not shown
    assert not list(tmp_path.rglob("*.png"))


def test_refuses_a_figure_without_alt_text(shown, figure):
    with pytest.raises(GemmateError, match="alt text"):
        show(figure, " ")
    assert not shown


def test_the_style_sets_distinct_colours_on_white(figure):
    assert mpl.rcParams["axes.prop_cycle"].by_key()["color"] == list(COLOURS)
    assert len(set(COLOURS)) == len(COLOURS) == 8
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
