"""One of the processes that gemmate_lib/launch.py starts: it trains, or notes why it could not."""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gemmate_lib.budget import Spent
from gemmate_lib.callbacks import Interrupted
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.manifest import write_whole
from gemmate_lib.ranks import ASKED, STRATEGY


def work(order: dict[str, Any]) -> None:
    """Do as the order says. Raises: what fine-tuning raises."""
    from gemmate_lib.cli_shipped import progress
    from gemmate_lib.sft import finetune_model

    os.environ |= {ASKED: str(order["world"]), STRATEGY: order["strategy"]}
    finetune_model(
        Experiment.model_validate(order["experiment"]),
        out=order["out"],
        resume=order["resume"],
        allow_changed=order["allow_changed"],
        report=progress if order["show"] else None,
    )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Read order.json in the folder named on the command line; note a failure beside it."""
    folder, rank = Path(sys.argv[-1]), int(os.environ.get("RANK", 0))
    note: dict[str, Any] = {"rank": rank}
    try:
        work(json.loads((folder / "order.json").read_text("utf-8")))
    except Interrupted as stop:
        note |= {"kind": "interrupted", "number": stop.exit_code - 128, "step": stop.step}
        code = stop.exit_code
    except Spent as stop:
        note |= {"kind": "spent", "said": str(stop)}
        code = stop.exit_code
    except GemmateError as error:
        note |= {"kind": "mendable", "said": str(error)}
        code = 2
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        note |= {"kind": "other", "said": said, "traceback": traceback.format_exc()}
        code = 1
    else:
        _leave()
        return
    note["at"] = time.time()
    write_whole(folder / f"rank-{rank}.json", json.dumps(note))
    sys.stdout.flush()
    os._exit(code)  # at once: torch would wait for ranks that are gone


if __name__ == "__main__":
    main()
