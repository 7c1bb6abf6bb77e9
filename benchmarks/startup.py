"""The course itself: what an import, a command and each notebook take.

Starts are medians of five processes; the notebooks are run once, headless, on the embedded model.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import parser_for, report, spread, where, write

TIMES = 5
STARTS = {
    "python, nothing else": ["-c", ""],
    "import gemmate_lib.config": ["-c", "import gemmate_lib.config"],
    "gemmate --help": ["-m", "gemmate_lib", "--help"],
    "gemmate config show quotes": ["-m", "gemmate_lib", "config", "show", "quotes"],
    "import torch": ["-c", "import torch"],
    "import gemmate_lib.sft": ["-c", "import gemmate_lib.sft"],
}


def seconds(arguments: Sequence[str]) -> float:
    """What a process takes from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def notebooks() -> dict[str, float]:
    """Seconds of each notebook of the course."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "course")
        seconds(["-m", "gemmate_lib", "course", "--profile", "tiny", "--out", str(out)])
        records = [json.loads(path.read_text("utf-8")) for path in out.glob("manifests/*.json")]
    return {record["notebook"]: record["seconds"] for record in records}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all of it."""
    parser = parser_for(__doc__)
    parser.add_argument("--no-notebooks", action="store_true", help="starts alone")
    given = parser.parse_args(arguments)
    starts = {name: {"s": spread([seconds(arguments) for _ in range(TIMES)])}
              for name, arguments in STARTS.items()}  # fmt: skip
    found: dict[str, Any] = {"starts": starts}
    if not given.no_notebooks:
        found["notebooks"] = {name: {"s": s} for name, s in sorted(notebooks().items())}
    report([row for part in found.values() for row in part.items()])
    write(found | {"machine": where()}, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
