"""Adapters over one base: put on and taken off while it serves, each as `open_run` would load it.

Plain adapters are mixed in one batch, row by row (PEFT's `adapter_names`). peft 0.21.2 refuses that
for DoRA, and for what an adapter brings beside its matrices, as GemmaTE brings its encoder (the
canary is in tests/integration/test_serve_engine.py): these have batches of their own.

A time-aware run is a second model over the very layers of the base, with the run's encoder in it;
so the base and the plain adapters never see an encoder.
"""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gemmate_lib.adapters import ENCODER, encoder_of, fitting_config, known_peft_warnings
from gemmate_lib.config import GemmateError
from gemmate_lib.methods import METHODS
from gemmate_lib.trust import WEIGHTS

if TYPE_CHECKING:
    from gemmate_lib.config import ModelConfig
    from gemmate_lib.models import LoadedModel
    from gemmate_lib.sft import Run

BASE = "__base__"  # PEFT's name for no adapter


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory: PEFT's name for it, and the model that it is asked through."""

    key: str
    model: Any
    time_aware: bool
    alone: bool

    @property
    def lane(self) -> str:
        """Which adapters it is batched with: those of the same lane."""
        return self.key if self.alone else BASE


class Fleet:
    """One base and its adapters; used by one thread at a time."""

    def __init__(self, base: "LoadedModel", *, held: "ModelConfig | None" = None) -> None:
        self.loaded, self.model, self._held = base, base.model.eval(), held
        aware = encoder_of(base.model) is not None
        self.base = Adapter(BASE, self.model, time_aware=aware, alone=False)
        self._peft: Any = None
        self._numbers = itertools.count()
        self._hooks, self._mixed = contextlib.ExitStack(), tuple[str, ...]()

    def add(self, run: "Run") -> Adapter:
        """Put a run's adapter beside the others.

        Raises: GemmateError for a method that has no adapter of its own layers, another base, or
            weights that do not fit.
        """
        refuse_method(run)
        self._unmix()  # its layers may be others than those of the adapters before
        settings = run.experiment.model
        aware = settings.temporal_kind is not None or self.base.time_aware
        own = {"kind": settings.temporal_kind or "", "tau": settings.temporal_tau}
        view = _beside(self.model, own) if aware else self.model
        config = fitting_config(replace(self.loaded, model=view), run.adapter)
        self._refuse_other_form(run)
        if getattr(config, "bias", "none") != "none":
            problem = f"{run.directory} trained biases of the base, which all adapters share"
            raise GemmateError(f"{problem}. Serve it alone, or train it with lora.bias=none.")
        key = f"adapter{next(self._numbers)}"
        encoder = self._put_on(key, config, run)
        if aware:  # once more: of a layer that was just replaced it would have the old one
            view = _beside(self.model, own)
            encoder_of(view).load_state_dict(encoder)
            view.eval()
        return Adapter(key, view, time_aware=aware, alone=aware or bool(config.use_dora))

    def _refuse_other_form(self, run: "Run") -> None:
        """An adapter on weights that are rounded otherwise says something else than its run."""
        for name in ("quantization", "compute_dtype") if self._held else ():
            ours, theirs = getattr(self._held, name), getattr(run.experiment.model, name)
            if ours != theirs:
                both = f"{run.directory} has its base in {name}={theirs}, this one is in {ours}"
                raise GemmateError(f"{both}: its answers would be others. Serve it apart.")

    def _put_on(self, key: str, config: Any, run: "Run") -> dict[str, Any]:
        """Load the matrices; return the weights of the encoder."""
        from peft import get_peft_model, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        mark = f".{ENCODER}."
        try:
            found = load_file(run.adapter / WEIGHTS, device=str(self.model.device))
            encoder = {k.partition(mark)[2]: found.pop(k) for k in [*found] if mark in k}
            config.modules_to_save, config.inference_mode = None, True
            config.base_model_name_or_path = self.model.name_or_path  # checked already
            with known_peft_warnings():
                if self._peft is None:
                    self._peft = get_peft_model(self.model, config, adapter_name=key)
                else:
                    self._peft.add_adapter(key, config)
                result = set_peft_model_state_dict(self._peft, found, adapter_name=key)
            missing = [name for name in result.missing_keys if f".{key}." in name]
            if missing or result.unexpected_keys:
                odd = (missing or result.unexpected_keys)[0]
                raise ValueError(f"{odd} is missing or unexpected")
        except (SafetensorError, ValueError, LookupError, RuntimeError) as error:
            self._take_off(key)
            why = str(error).splitlines()[0].rstrip(".")
            raise GemmateError(f"Cannot load {run.directory}: {why}. Train it again.") from error
        self._peft.eval()
        return encoder

    def drop(self, adapter: Adapter) -> None:
        """Take an adapter off; nothing may be generated by it any more."""
        self._unmix()
        self._take_off(adapter.key)

    def _take_off(self, key: str) -> None:
        if self._peft is None or key not in self._peft.peft_config:
            return
        others = [name for name in self._peft.peft_config if name != key]
        if not others:  # the plain layers come back
            self._peft.unload()
            self._peft = None
            return
        self._activate(others[0])  # PEFT warns where the active one goes
        self._peft.delete_adapter(key)

    def _activate(self, key: str) -> None:
        if self._peft.active_adapter != key:
            self._peft.set_adapter(key, inference_mode=True)

    def forward(self, adapters: Sequence[Adapter], inputs: dict[str, Any]) -> Any:
        """Compute logits [B, 1, V] for rows that are all of one lane."""
        first, names = adapters[0], tuple(each.key for each in adapters)
        if self._peft is not None and names != self._mixed:
            self._unmix()
            if first.alone or (set(names) == {first.key} and first is not self.base):
                self._activate(first.key)
            else:
                self._mix(names)
        return first.model(**inputs, logits_to_keep=1).logits

    def _mix(self, names: tuple[str, ...]) -> None:
        """Let each row go by its own adapter from now on.

        What `adapter_names` does for one call: as long as the rows stay the same it is not undone
        and done again for each token, which costs more than the token where the model is small.
        """
        self._hooks.enter_context(
            self._peft.base_model._enable_peft_forward_hooks(adapter_names=[*names])
        )
        self._mixed = names

    def _unmix(self) -> None:
        self._hooks.close()
        self._mixed = ()


def _beside(model: Any, own: dict[str, Any]) -> Any:
    from gemmate_lib.temporal.modeling import beside

    return beside(model, **own)


def refuse_method(run: "Run") -> None:
    """Raise GemmateError for a run that is no adapter of a base's layers."""
    method = METHODS[run.experiment.method]
    if run.experiment.method == "full":
        why = "trained every weight, so it shares no base"
    elif method.soft:
        why = f"is {method.title}: learned vectors in front of the text, which no batch can mix"
    else:
        return
    remedy = "Ask it with `gemmate generate`; lora, qlora, dora and rslora are served"
    raise GemmateError(f"{run.directory} {why}. {remedy}.")
