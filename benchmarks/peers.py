"""Against peers on the same work: our step, that of `trl sft`, of torchtune and of litgpt.

Every arm trains a LoRA of rank 8 on the seven projections of one model from the same A matrices:
the same rows of tiny_quotes in the same order, four to a step, the loss on all of a text, float32
arithmetic, AdamW, a linear schedule. Each run is a process of its own, the arms take turns, a ratio
is that of two runs side by side. A peer's step lasts from one printed loss to the next; a gap of
losses can be the rounding of what it prints: TRL four digits, litgpt three behind the point.

`trl sft` is the command line as it comes, which recomputes activations, and again without that;
over 4-bit weights it trains its adapter in bfloat16. torchtune (`tune run`) and litgpt (what its
`finetune_lora` calls) run in the environment of `--peer-python`. torchtune's NF4 quantizes the
scales as well, 256 at a time. litgpt has 4 bits on GPUs alone and clips no gradients; its cosine is
made linear. On a GPU also Liger's kernels, through TRL, and Unsloth: these two were not run.
"""

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from common import HIDDEN, WARM, parser_for, ratios, report, spread, where, write
from training import ARMS, PAIRS, SIZES, models_here, run, settings_of

RATE, FAR = 2e-4, 0.1  # losses further apart than that: not the same work
LOSS = re.compile(r"(?:'loss': '?|\| loss:|loss train: )([\d.]+)")  # TRL, torchtune, litgpt
PEERS = ("torch", "torchtune", "torchao", "litgpt", "unsloth")
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
# The same numbers as transformers, torchtune and litgpt name them.
SHAPE = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
         "head_dim", "intermediate_size", "vocab_size"]  # fmt: skip
TUNE = ["num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "intermediate_dim",
        "vocab_size"]  # fmt: skip
LIT = ["n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size",
       "padded_vocab_size"]  # fmt: skip
OF_TUNE = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
OF_LIT = {"attn.qkv": ATTENTION, "attn.proj": ["o_proj"], "mlp.fc_1": ["gate_proj"],
          "mlp.fc_2": ["up_proj"], "mlp.proj": ["down_proj"]}  # fmt: skip


def prepare(model: str, steps: int, folder: Path) -> dict[str, Any]:
    """Write model, texts, token ids in the order they are trained on, and A matrices."""
    import torch

    from gemmate_lib.adapters import attach_lora
    from gemmate_lib.models import load_base
    from gemmate_lib.rows import encode
    from gemmate_lib.sft import load_splits

    found = settings_of(model, "weights in 32 bits", steps)
    base, rows = load_base(found.model), load_splits(found).train
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))  # accelerate's
    first = [encode(rows[i], base.tokenizer, max_length=128, over_long="drop")
             for i in order[: 4 * steps]]  # fmt: skip
    ids = [row.input_ids for row in first if row]
    base.model.float().save_pretrained(folder / "model")
    base.tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    texts = (json.dumps({"text": row.prompt + row.completion}) + "\n" for row in rows)
    (folder / "data/train.jsonl").write_text("".join(texts), "utf-8")
    tuned = attach_lora(base.model, found.lora, seed=0).named_parameters()
    places = ((name.split("."), weight) for name, weight in tuned if ".lora_A." in name)
    starts = {f"{place[4]}.{place[6]}": weight.data.cpu() for place, weight in places}
    torch.save(starts, folder / "start.pt")
    tokens = sum(map(len, ids[4 * WARM :])) / (steps - WARM)
    return {"steps": steps, "tokens": tokens, "rows": ids, "cuda": torch.cuda.is_available(),
            "shape": [getattr(base.model.config, name) for name in SHAPE]}  # fmt: skip


def linear(optimizer: Any, num_training_steps: int, last_epoch: int = -1, **_: Any) -> Any:
    """The schedule of ours: two steps up, then down to 0."""
    from torch.optim.lr_scheduler import LambdaLR

    left = num_training_steps - 2
    return LambdaLR(optimizer, lambda i: min(i / 2, max(0, 1 - (i - 2) / left)), last_epoch)


def tune_rows(_: Any, **__: Any) -> list[dict[str, list[int]]]:
    """The rows for torchtune."""
    rows = json.loads(Path("job.json").read_text())["rows"]
    return [{"tokens": ids, "labels": [-100, *ids[1:]]} for ids in rows]


def tune_model(**shape: Any) -> Any:
    """torchtune's Gemma with the A matrices of ours."""
    import torch
    from torchtune.models.gemma import lora_gemma

    model, starts = lora_gemma(**shape), torch.load("start.pt")
    for name, value in model.named_parameters():
        if name.endswith(".lora_a.weight"):
            _, layer, _, own, *_ = name.split(".")
            value.data.copy_(starts[f"{layer}.{OF_TUNE.get(own, own)}"])
    return model


def tune(job: dict[str, Any]) -> list[str]:
    """`tune run`: torchtune's recipe and settings for Gemma, and what makes it the same work."""
    said = f"""-m torchtune._cli.tune run lora_finetune_single_device --config
        gemma/2B_lora_single_device output_dir=tune device={"cuda" if job["cuda"] else "cpu"}
        dtype=fp32 tokenizer._component_=types.SimpleNamespace tokenizer.pad_id=0 seed=0
        shuffle=False dataset._component_=peers.tune_rows model._component_=peers.tune_model
        model.lora_attn_modules=[{",".join(ATTENTION)},output_proj] model.lora_rank=8
        model.lora_alpha=16 model.max_seq_len=128 model.quantize_base={job["weights"] == "nf4"}
        checkpointer.checkpoint_dir=model checkpointer.checkpoint_files=[model.safetensors]
        lr_scheduler._component_=peers.linear optimizer.lr={RATE} optimizer.weight_decay=0
        clip_grad_norm=1 max_steps_per_epoch={job["steps"]} gradient_accumulation_steps=1
        enable_activation_checkpointing=False save_adapter_weights_only=True
        metric_logger._component_=torchtune.training.metric_logging.StdoutLogger"""
    return [*said.split(), *(f"model.{k}={n}" for k, n in zip(TUNE, job["shape"], strict=True))]


def litgpt(job: dict[str, Any]) -> None:
    """What `litgpt convert_to_litgpt` and `litgpt finetune_lora` call, with our rows."""
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import name_to_config
    from litgpt.data import DataModule, get_sft_collate_fn
    from litgpt.finetune import lora
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    own = {"name": "Gemma-peer", "norm_eps": 1e-6} | dict(zip(LIT, job["shape"], strict=True))
    name_to_config["Gemma-peer"] = name_to_config["Gemma-2b"] | own
    model = Path(shutil.copytree("model", "litgpt", dirs_exist_ok=True))
    convert_hf_checkpoint(model, model_name="Gemma-peer", dtype="float32")
    weights, starts = torch.load(model / "lit_model.pth"), torch.load("start.pt")
    for layer in range(job["shape"][0]):
        for name, ours in OF_LIT.items():
            joined = torch.cat([starts[f"{layer}.{one}"] for one in ours])
            weights[f"transformer.h.{layer}.{name}.lora_A"] = joined
    torch.save(weights, model / "lit_model.pth")
    counts = dict.fromkeys(("raw", "raw_plus_prompt_template"), 0)
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids), "token_counts": counts}
            for ids in job["rows"]]  # fmt: skip
    loader = torch.utils.data.DataLoader(rows, 4, collate_fn=get_sft_collate_fn())
    data: Any = DataModule()
    data.connect = lambda *_, **__: None
    data.train_dataloader = data.val_dataloader = lambda: loader
    lora.get_lr_scheduler = lambda optimizer, max_steps, **_: linear(optimizer, max_steps)
    lora.save_lora_checkpoint = lambda *_: sys.exit(0)  # it was trained
    adamw = {"lr": RATE, "weight_decay": 0.0, "fused": True}
    lora.setup(model, Path("litgpt-out"), precision="32-true", data=data, seed=0, lora_dropout=0.0,
               lora_key=True, lora_projection=True, lora_mlp=True,
               optimizer={"class_path": "torch.optim.AdamW", "init_args": adamw},
               eval=EvalArgs(10**6, 1, max_iters=1, final_validation=False),
               train=TrainArgs(None, 1, 4, 4, 2, epochs=2, max_steps=job["steps"]))  # fmt: skip


def unsloth(job: dict[str, Any]) -> None:
    """Unsloth's model in TRL's trainer, which it patches."""
    from unsloth import FastLanguageModel  # isort: skip
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    nf4, targets = job["weights"] == "nf4", [*ATTENTION, "o_proj", *MLP]
    base, tokenizer = FastLanguageModel.from_pretrained("model", 128, "float32", load_in_4bit=nf4)
    model = FastLanguageModel.get_peft_model(base, 8, targets, 16, random_state=0,
                                             use_gradient_checkpointing=False)  # fmt: skip
    args = SFTConfig("unsloth", learning_rate=RATE, warmup_steps=2, max_steps=job["steps"], seed=0,
                     per_device_train_batch_size=4, logging_steps=1, disable_tqdm=True, data_seed=0,
                     report_to="none", max_length=128)  # fmt: skip
    rows = load_dataset("data", split="train")
    SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()


def ours(job: dict[str, Any]) -> None:
    """Our trainer, as the benchmark of training runs it."""
    own = {"model.quantization": job["weights"], "model.compute_dtype": "float32"}
    ARMS["peer"] = ARMS["ours"] | own
    took, losses = run("model", "peer", job["steps"], Path("ours"))
    print(json.dumps([(took * step, loss) for step, loss in enumerate(losses)]))


def trl(job: dict[str, Any]) -> list[str]:
    """`trl sft`, with what makes it the same work."""
    script = shutil.which("trl", path=Path(sys.executable).parent) or "trl"
    said = f"""sft --model_name_or_path model --dataset_name data --output_dir trl --use_peft
        --lora_r 8 --lora_alpha 16 --lora_dropout 0 --seed 0 --data_seed 0 --bf16 False
        --lora_target_modules {" ".join([*ATTENTION, "o_proj", *MLP])} --learning_rate {RATE}
        --warmup_steps 2 --per_device_train_batch_size 4 --max_steps {job["steps"]}
        --max_length 128 --logging_steps 1 --disable_tqdm True --report_to none --save_strategy no
        {"--load_in_4bit" if job["weights"] == "nf4" else ""}"""
    return [script, *said.split()]


def arms(job: dict[str, Any], peer: str, has: Container[str]) -> dict[str, list[str] | str]:
    """The command of each arm, or why there is none."""
    me, kept = [str(Path(__file__).resolve()), "--child"], [*trl(job), "--gradient_checkpointing=0"]
    found: dict[str, list[str] | str] = {"ours": [sys.executable, *me, "ours"], "trl sft": trl(job),
                                         "trl sft, activations kept": kept}  # fmt: skip
    peers = {"torchtune": [peer, *tune(job)], "litgpt": [peer, *me, "litgpt"]}
    if job["cuda"]:
        liger = importlib.util.find_spec("liger_kernel")
        found["trl sft, Liger"] = [*kept, "--use_liger_kernel=1"] if liger else "not installed"
        peers["unsloth"] = [peer, *me, "unsloth"]
    found |= {name: command if name in has else "not installed" for name, command in peers.items()}
    if job["weights"] == "nf4":
        found["litgpt"] = "not run in 4 bits"
        _, width, _, heads, size, *_ = job["shape"]
        if heads * size * width % 2**14:  # 256 scales of 64 weights
            found["torchtune"] = "no NF4 this small"
    return found


def watched(command: list[str], steps: int, folder: Path) -> tuple[float, list[float]]:
    """Seconds of a step, and the loss after each."""
    own = {"PYTHONUNBUFFERED": "1", "HF_DATASETS_CACHE": str(folder / "hf"), "HF_HUB_OFFLINE": "1",
           "PYTHONPATH": str(Path(__file__).resolve().parent)}  # fmt: skip
    seen: list[tuple[float, float]] = []
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True,
                                   cwd=folder, env=os.environ | own)  # fmt: skip
        for line in process.stdout or ():
            if line.startswith("[["):  # ours: all of them at the end
                seen = json.loads(line)
            elif printed := LOSS.search(line):
                seen.append((time.perf_counter(), float(printed[1])))
    if process.wait() or len(seen) != steps:
        raise RuntimeError(f"{command}\n{(folder / 'errors.txt').read_text('utf-8')[-3000:]}")
    return (seen[-1][0] - seen[WARM - 1][0]) / (steps - WARM), [loss for _, loss in seen]


def compare(job: dict[str, Any], peer: str, has: Container[str], folder: Path) -> dict[str, Any]:
    """Every arm in turn, PAIRS times over."""
    commands = arms(job, peer, has)
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    losses: dict[str, list[float]] = {}
    for _ in range(PAIRS):
        for name, command in commands.items():
            if isinstance(command, list):
                took, losses[name] = watched(command, job["steps"], folder)
                seconds[name].append(took)
    rows: dict[str, Any] = {name: {"ms a step": why} for name, why in commands.items()}
    for name, each in losses.items():
        rows[name] = {
            "ms a step": spread([1000 * s for s in seconds[name]]),
            "ours times as fast": ratios(seconds[name], seconds["ours"]),
            "tokens a second": job["tokens"] / spread(seconds[name])[0],
            "largest loss gap": max(abs(a - b) for a, b in zip(each, losses["ours"], strict=True)),
        }
    return {"arms": rows, "losses": losses}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where the losses of an arm are not those of ours: then it did other work."""
    parser = parser_for(__doc__)
    parser.add_argument("--peer-python", help="of an environment with torchtune, litgpt, unsloth")
    parser.add_argument("--child", help=HIDDEN)
    given = parser.parse_args(arguments)
    if given.child:
        globals()[given.child](json.loads(Path("job.json").read_text("utf-8")))
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"  # for every arm, as ours has it
    from gemmate_lib import machine

    machine.quiet()
    has: dict[str, str] = {}
    if peer := given.peer_python or "":
        asked = "import json, importlib.metadata as m; each = m.distributions()\n"
        asked += f"print(json.dumps({{d.name: d.version for d in each if d.name in {PEERS}}}))"
        has = json.loads(subprocess.check_output([peer, "-c", asked]))
    found: dict[str, Any] = {"pairs": PAIRS, "models": {}}
    with tempfile.TemporaryDirectory() as temporary:
        models = models_here(Path(temporary))
        for (name, model), weights in itertools.product(models.items(), ("none", "nf4")):
            title = f"{name}, {'NF4' if weights == 'nf4' else '32 bits'}"
            (folder := Path(temporary, title)).mkdir()
            job = prepare(model, SIZES[name], folder) | {"weights": weights}
            found["models"][title] = compare(job, peer, has, folder)
            print(f"\n{title}: {job['steps']} steps of four rows")
            report([*found["models"][title]["arms"].items()])
    found["machine"] = where() | {"peers": has}
    write(found, given.out)
    rows = [row for model in found["models"].values() for row in model["arms"].values()]
    return int(any(row.get("largest loss gap", 0) > FAR for row in rows))


if __name__ == "__main__":
    sys.exit(main())
