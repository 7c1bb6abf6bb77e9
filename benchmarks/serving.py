"""Serving three adapters over one base: throughput and latency against concurrency, by turns.

Clients ask over HTTP for greedy texts, each again as soon as it is answered. Three arms: rows of
all adapters in one batch (`mixed batches`), the same requests where every adapter has a batch of
its own (`a batch for each`), and as many requests for one adapter alone (`one adapter`), which no
mixing can outdo. The server has a process of its own; all texts are compared.
"""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from common import HIDDEN, parser_for, ratios, report, spread, where, write

ROUNDS, TOKENS, CONCURRENCY = 3, 24, (1, 2, 4, 8, 16)
MIXED, EACH, ONE = "mixed batches", "a batch for each", "one adapter"
NAMES = ("first", "second", "third")
STARTS = (
    "Quote: Imagination is more",
    "Quote: I am not talented, but",
    "Quote: The only way",
    "Quote: Be yourself; everyone",
    "Quote: A room without books is",
    "Quote: So many",
)


def adapters() -> dict[str, Any]:
    """Three short runs on the embedded model that differ in their seed."""
    from gemmate_lib import machine
    from gemmate_lib.config import resolve
    from gemmate_lib.sft import finetune_or_load

    found, facts = {}, machine.read_facts()
    for seed, name in enumerate(NAMES):
        short = {"model.quantization": "none", "training.max_steps": 30, "training.eval_every": 0,
                 "seed": seed, "model.device": facts.device}  # fmt: skip
        settings = resolve("quotes", facts=facts, profile="tiny", overrides=short)
        found[name] = finetune_or_load(settings.experiment)
    return found


def serve(arm: str) -> None:
    """Be a server, whose address is the first line."""
    import dataclasses

    from gemmate_lib.serve import server
    from gemmate_lib.serve.api import build_app
    from gemmate_lib.serve.limits import Limits
    from gemmate_lib.serve.opening import open_engine

    limits = Limits(slots=max(CONCURRENCY))
    engine = open_engine(adapters(), limits=limits)
    if arm == EACH:
        for name in NAMES:
            entry = engine._entries[name]
            entry.adapter = dataclasses.replace(entry.adapter, alone=True)
    with server.bind("127.0.0.1", 0) as listener:
        address = server.address_of(listener)
        server.run(build_app(engine, limits), engine, listener, limits=limits,
                   started=lambda: print(address, flush=True))  # fmt: skip


@contextlib.contextmanager
def running(arm: str) -> Iterator[str]:
    """A server in a process of its own; its address."""
    command = [sys.executable, __file__, "--serve", arm]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(60)


async def crowd(
    address: str, asks: Sequence[tuple[str, str]], at_once: int
) -> tuple[float, list[float], dict[tuple[str, str], tuple[str, int]]]:
    """Ask; seconds for all, seconds of each, and what was said with its number of tokens."""
    import httpx

    todo, seconds, said = iter(asks), [], {}
    async with httpx.AsyncClient(base_url=address, timeout=300) as client:

        async def work() -> None:
            for name, prompt in todo:
                began = time.perf_counter()
                body = {"model": name, "prompt": prompt, "max_tokens": TOKENS}
                reply = (await client.post("/v1/completions", json=body)).json()
                seconds.append(time.perf_counter() - began)
                tokens = reply["usage"]["completion_tokens"]
                said[name, prompt] = reply["choices"][0]["text"], tokens

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(at_once)))
        return time.perf_counter() - began, seconds, said


def workload(arm: str, at_once: int) -> list[tuple[str, str]]:
    """Which model is asked what; the same for each round."""
    number = 18 + 6 * at_once
    names = NAMES[:1] if arm == ONE else NAMES
    return [(names[i % len(names)], f"{STARTS[i % 6]} {i // 6 % 7}") for i in range(number)]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(addresses: dict[str, str]) -> tuple[dict[str, Any], int]:
    """Each arm at each concurrency, by turns; and how many texts differ from the first ones."""
    cells: dict[tuple[str, int], list[dict[str, float]]] = {}
    first: dict[tuple[str, str], str] = {}
    other = 0
    for turn in range(ROUNDS + 1):
        for at_once in CONCURRENCY:
            for arm, address in addresses.items():
                asks = workload(arm, at_once)
                took, seconds, said = asyncio.run(crowd(address, asks, at_once))
                other += sum(first.setdefault(ask, text) != text for ask, (text, _) in said.items())
                if turn == 0:  # warm
                    continue
                tokens = sum(said[ask][1] for ask in asks)
                found = {"requests/s": len(asks) / took, "tokens/s": tokens / took}
                found |= {f"p{n} ms": 1000 * quantile(seconds, n / 100) for n in (50, 95, 99)}
                cells.setdefault((arm, at_once), []).append(found)
    rows: dict[str, Any] = {arm: {} for arm in addresses}
    for (arm, at_once), rounds in cells.items():
        rows[arm][str(at_once)] = {k: spread([each[k] for each in rounds]) for k in rounds[0]}
        speeds = [[each["tokens/s"] for each in cells[a, at_once]] for a in (arm, EACH)]
        rows[arm][str(at_once)]["times as fast"] = ratios(*speeds)
    return rows, other


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where a text differs, or mixed batches are no faster at the most requests."""
    parser = parser_for(__doc__)
    parser.add_argument("--serve", choices=(MIXED, EACH), help=HIDDEN)
    given = parser.parse_args(arguments)
    from gemmate_lib import machine

    machine.quiet()
    from gemmate_lib.serve.server import check_installed

    check_installed()
    if given.serve:
        serve(given.serve)
        return 0
    adapters()  # once, before two servers want them
    with running(MIXED) as mixed, running(EACH) as each:
        rows, other = measure({MIXED: mixed, EACH: each, ONE: mixed})
    for arm, cells in rows.items():
        print(f"{arm}: requests at a time, {ROUNDS} rounds")
        report([*cells.items()])
    result = {"concurrency": CONCURRENCY, "max_new_tokens": TOKENS, "rounds": ROUNDS,
              "adapters": len(NAMES), "arms": rows, "other texts": other,
              "machine": where()}  # fmt: skip
    write(result, given.out)
    faster = rows[MIXED][str(CONCURRENCY[-1])]["times as fast"][0] > 1
    return 0 if faster and not other else 1


if __name__ == "__main__":
    sys.exit(main())
