"""Legacy checkpoints: both layouts load to the same logits; nothing but tensors is unpickled."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gemmate_lib.cli import app
from gemmate_lib.config import GemmateError, ModelConfig
from gemmate_lib.models import load_base
from gemmate_lib.temporal.convert import convert, read_legacy

IDS, TIMES = torch.tensor([[2, 50, 60, 70]]), torch.tensor([1_234_567_890_000])


@pytest.fixture(scope="module", params=["tiny-gemma", "tiny-gemma2"])
def trained(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """A time-aware model with a learned encoder, and the name of its base."""
    model = load_base(ModelConfig(id=request.param, temporal_kind="log")).model.eval()
    torch.nn.init.normal_(model.temporal.projection.weight, std=0.1)
    return request.param, model


def original_layout(model: Any) -> dict[str, torch.Tensor]:
    """The names of Google's gemma_pytorch."""
    theirs = {"freqs_cis": torch.zeros(4)}
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("q_proj.weight"):
            parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            theirs[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "lm_head.weight")):
            theirs[name.replace("model.embed_tokens", "embedder").replace(
                "model.temporal", "temporal")] = tensor  # fmt: skip
    return theirs


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS, timestamps=TIMES).logits


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("layout", [original_layout, lambda model: model.state_dict()])
def test_a_checkpoint_becomes_a_model(
    trained: tuple[str, Any], tmp_path: Path, layout: Any, wrapped: bool
) -> None:
    base, model = trained
    state = layout(model)
    torch.save({"epoch": 3, "model_state_dict": state} if wrapped else state, tmp_path / "a.pt")
    command = ["convert", str(tmp_path / "a.pt"), "--out", str(tmp_path / "out"), "--base", base]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    again = load_base(ModelConfig(id=str(tmp_path / "out")))
    assert torch.equal(logits(again.model), logits(model))
    assert again.model.config.temporal_kind == "log" and "starts at zero" not in done.output


def test_without_an_encoder_it_starts_at_zero(trained: tuple[str, Any], tmp_path: Path) -> None:
    base, model = trained
    state = {k: v for k, v in original_layout(model).items() if "temporal" not in k}
    torch.save(state, tmp_path / "a.pt")
    told = convert(tmp_path / "a.pt", tmp_path / "out", base=base, kind="calendar")
    assert "no encoder of time" in told[1]
    plain = load_base(ModelConfig(id=base)).model.eval()
    with torch.inference_mode():
        expected = plain(input_ids=IDS).logits
    assert torch.equal(logits(load_base(ModelConfig(id=str(tmp_path / "out"))).model), expected)


class Evil:
    """What a pickle can do: run a function when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    evil, touched = Evil(tmp_path / "touched"), tmp_path / "touched"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model_state_dict": evil}))
    torch.save({"w": evil}, tmp_path / "zipped.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("evil.pt", "zipped.pt", "empty.pt"):
        with pytest.raises(GemmateError, match="is no file of plain tensors"):
            read_legacy(tmp_path / name)
    assert not touched.exists()
    pickle.loads((tmp_path / "evil.pt").read_bytes())
    assert touched.exists()  # it would have been


def test_what_does_not_fit_is_named(trained: tuple[str, Any], tmp_path: Path) -> None:
    base, model = trained
    state = dict(model.state_dict())
    norm = "model.norm.weight"
    for change, why in (
        ({norm: None}, r"lacks model\.norm\.weight"),
        ({"extra": torch.zeros(1)}, "holds extra, which"),
        ({norm: torch.zeros(3)}, r"is \[3\], not \[128\]"),
        ({norm: torch.full((128,), torch.nan)}, "not finite"),
        ({norm: "text"}, "which is no tensor"),
    ):
        changed = {k: v for k, v in (state | change).items() if v is not None}
        torch.save(changed, tmp_path / "a.pt")
        with pytest.raises(GemmateError, match=why):
            convert(tmp_path / "a.pt", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    torch.save(list(state.values()), tmp_path / "b.pt")
    with pytest.raises(GemmateError, match="holds no state dict"):
        read_legacy(tmp_path / "b.pt")
    with pytest.raises(GemmateError, match=r"is \[128, 2\], not \[128, 222\]"):
        torch.save(state, tmp_path / "c.pt")
        convert(tmp_path / "c.pt", tmp_path / "out", base=base, kind="calendar")
    with pytest.raises(GemmateError, match="exists"):
        convert(tmp_path / "c.pt", tmp_path, base=base)
