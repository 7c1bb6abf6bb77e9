"""What training will need in memory, before it is started: where each byte goes.

Weights, adapter, gradients and the optimizer's state follow from shapes. What autograd keeps
between forward and backward is counted on the model's own code: one layer and two, of the true
width, on a few tokens; it grows with the tokens, and their square where attention is not fused.

Legend: B rows, T tokens a row, V words of the vocabulary.
"""

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gemmate_lib.adapters import attach_lora, train_all
from gemmate_lib.config import Experiment, GemmateError, ModelConfig
from gemmate_lib.methods import METHODS
from gemmate_lib.models import predict_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# google/gemma-2b, as in its config.json: what the token-less see of it.
GEMMA_2B: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
LENGTHS = 16, 32, 64  # three points for a parabola
TILE = 4096, 32_768  # TRL 1.16, kernels/chunked_logprob.py: tokens and words of a tile of logits
TILES_ON_CPU = 8.25  # float32 copies of a tile at once, where there is no Triton to fold them
ADAM_STATE = {"adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_8bit": 2, "adamw_8bit": 2,
              "paged_adamw_32bit": 8, "adamw_bnb_8bit": 2, "sgd": 0}  # fmt: skip


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a training step, by what they are for."""

    base: int
    """The frozen weights as they lie in memory; nothing where every weight is trained."""
    trained: int
    """The trained weights, in float32."""
    gradients: int
    """One a trained weight, in float32, beyond the room that activations leave as they go."""
    optimizer: int
    """The optimizer's state."""
    activations: int
    """What forward keeps for backward."""
    working: int
    """What comes and goes: a tile of logits, a layer's weights unpacked, its gradients."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Counted:
    """What only the model's own code tells: trained weights, and bytes that autograd keeps.

    Autograd keeps a + B (b T + c T²) bytes of a layer; a are adapters' weights, cast.
    """

    trained: int
    a: float
    b: float
    c: float

    def kept(self, rows: int, length: int) -> int:
        """Bytes of one layer."""
        return int(self.a + rows * (self.b * length + self.c * length**2))


def count(config: "PreTrainedConfig", experiment: Experiment) -> Counted:
    """Count them: a model of two layers less a model of one, at three lengths."""
    import numpy as np

    one, two = ([_kept(config, n, length, experiment) for length in LENGTHS] for n in (1, 2))
    c, b, a = np.polyfit(LENGTHS, np.subtract(two, one), 2)
    model = _trainable(_on_meta(config), experiment)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Counted(trained, float(a), float(b), float(c))


def predict(
    experiment: Experiment, config: "PreTrainedConfig", counted: Counted | None = None
) -> Footprint:
    """What a training step of full rows needs, rows of `dataset.max_length` tokens each.

    config: the base's. counted: where it is known already; it hangs on the model, its dtype, the
    adapter and the method, not on rows, lengths or quantization.
    Raises: GemmateError for an optimizer whose state is not known here.
    """
    optim, model = experiment.training.optim, experiment.model
    if optim not in ADAM_STATE:
        known = ", ".join(ADAM_STATE)
        raise GemmateError(f"The state of {optim} is not known here. Known: {known}.")
    counted = counted or count(config, experiment)
    base = predict_bytes(config, model.quantization, dtype=model.compute_dtype)
    rows = of_rows(experiment, config, counted, experiment.training.batch_size)
    return Footprint(
        base=0 if experiment.method == "full" else base,
        trained=4 * counted.trained,
        optimizer=ADAM_STATE[optim] * counted.trained,
        **rows,
    )


def of_rows(
    experiment: Experiment, config: "PreTrainedConfig", counted: Counted, rows: int
) -> dict[str, int]:
    """Bytes that hang on the rows of a step: gradients, activations, and what comes and goes."""
    text, model, training = config.get_text_config(), experiment.model, experiment.training
    width, length = 4 if model.compute_dtype == "float32" else 2, experiment.dataset.max_length
    tokens, layers = rows * length, text.num_hidden_layers
    stream = tokens * text.hidden_size * width  # what enters a layer
    layer = counted.kept(rows, length)
    kept = layers * stream + layer if training.gradient_checkpointing else layers * layer
    gradients, activations = 4 * counted.trained, kept + stream
    if experiment.method == "full" and text.tie_word_embeddings:  # the head's, and the words'
        gradients += 4 * text.vocab_size * text.hidden_size
    if training.gradient_accumulation_steps == 1:  # nothing is left of the step before
        gradients = max(0, gradients - activations)
    working = max(_tile(text, tokens, model), _layer(text, tokens, width))
    return {"gradients": gradients, "activations": activations, "working": working}


def _tile(text: Any, tokens: int, model: ModelConfig) -> int:
    """Bytes of the tiles of logits that the loss is worked out on."""
    words, half = min(text.vocab_size, TILE[1]), model.compute_dtype != "float32"
    values = min(tokens, TILE[0]) * words
    if model.device == "cuda":
        return values * (2 if half else 4)
    # 16-bit weights of the tile are multiplied in float32.
    return int(values * 4 * TILES_ON_CPU) + half * 4 * words * text.hidden_size


def _layer(text: Any, tokens: int, width: int) -> int:
    """Bytes of a layer's widest weight, unpacked, and of the gradients beside it."""
    inner = getattr(text, "intermediate_size", 4 * text.hidden_size)
    return width * (text.hidden_size * inner + 3 * tokens * inner)


def _on_meta(config: Any, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def _trainable(model: Any, experiment: Experiment) -> Any:
    if experiment.method == "full":
        return train_all(model)
    if METHODS[experiment.method].soft:
        raise GemmateError("What a soft prompt needs is not predicted. Name another method.")
    model = attach_lora(model, experiment.lora, seed=0, kind=experiment.method)
    for parameter in model.parameters():  # as trainer.py does
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _kept(config: Any, layers: int, length: int, experiment: Experiment) -> int:
    """Bytes that autograd keeps of the inner model's forward on one row, weights left out.

    The weights are never set: what is kept hangs on shapes and types alone.
    """
    import torch

    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = layers, 2 * length, 0
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    dtype = getattr(torch, experiment.model.compute_dtype)
    model = _trainable(_on_meta(config, dtype=dtype), experiment).to_empty(device="cpu").train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Any] = {}

    def hold(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage  # held, so that its address is not given out again
        return tensor

    half = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with half, torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        model(input_ids=torch.arange(length)[None], use_cache=False)
    return sum(storage.nbytes() for storage in held.values())
