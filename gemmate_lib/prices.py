"""What a training would cost in the cloud, and how long it would take: rough, and it says so.

Prices stand in assets/prices.yaml with the day of each. Time follows from arithmetic: a token costs
so many operations, of which a GPU does an assumed share of its peak.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemmate_lib.config import Experiment, Facts, GemmateError, among, choose_profile, resolve

TABLE = Path(__file__).with_name("assets") / "prices.yaml"
STALE = 180  # days
# Shares of the peak that training reaches, low and high. A guess from published trainings of models
# this small, not a measurement of ours; measure your own with `gemmate bench training`.
SHARES = 0.1, 0.4
STARTUP = 0.15  # hours until an image is fetched and the packages are installed; billed as well


class Machine(BaseModel):
    """A machine with its GPUs, and what an hour of it costs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    machine: str
    """Its type, as Vertex AI calls it."""
    accelerator: str
    """Its GPUs, as Vertex AI calls them."""
    count: Annotated[int, Field(ge=1)]
    """How many."""
    capability: tuple[int, int]
    """Of one, as NVIDIA counts it."""
    memory_gib: Annotated[float, Field(gt=0)]
    """Of one, as its driver reports it."""
    tflops: Annotated[float, Field(gt=0)]
    """Peak of one, dense, in 16 bits."""
    usd: Annotated[float, Field(gt=0)] | None
    """An hour on demand; none: it is not sold on demand."""
    usd_spot: Annotated[float, Field(gt=0)] | None
    """An hour that may be taken away at any time."""
    as_of: date
    """The day that the prices are of."""
    regions: tuple[str, ...]
    """Where there is one."""

    @property
    def facts(self) -> Facts:
        """What a profile is chosen by."""
        return Facts("cuda", self.capability, self.memory_gib, 0.0, self.count)

    def price(self, *, spot: bool) -> float | None:
        """An hour of it, in USD; none where it is not sold so."""
        return self.usd_spot if spot else self.usd

    def stale(self, today: date | None = None) -> bool:
        """Whether its price is older than `STALE` days."""
        return ((today or date.today()) - self.as_of).days > STALE


def read_prices(path: str | Path = TABLE) -> list[Machine]:
    """Read a table of prices: the library's, or your own.

    Raises: GemmateError naming the row that cannot be understood.
    """
    try:
        rows = yaml.safe_load(Path(path).read_text("utf-8"))["machines"]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
        raise GemmateError(f"{path} is no table of prices: {error}. Mend it.") from None
    machines = []
    for number, row in enumerate(rows):
        try:
            machines.append(Machine.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise GemmateError(f"{path}, row {number}: {where}: {first['msg']}. Mend it.") from None
    return machines


def find_machine(
    machine: str, accelerator: str | None, count: int | None, *, region: str,
    table: Iterable[Machine] | None = None,
) -> Machine:  # fmt: skip
    """The row of a machine with its GPUs.

    Raises: GemmateError for a machine that is not in the table, other GPUs than it has, or a region
        without it.
    """
    rows = list(read_prices() if table is None else table)
    among(machine, {row.machine for row in rows}, "machine type")
    own = [row for row in rows if row.machine == machine]
    asked = [r for r in own if accelerator in (None, r.accelerator) and count in (None, r.count)]
    if not asked:
        has = " or ".join(f"{row.count} {row.accelerator}" for row in own)
        found = f"{count or 1} {accelerator or 'accelerator'}"
        raise GemmateError(f"{machine} has {has}, not {found}. Name what it has, or leave it out.")
    if region not in asked[0].regions:
        listed = ", ".join(asked[0].regions)
        raise GemmateError(f"{region} has no {machine} as far as is known on {asked[0].as_of}. "
                           f"Choose one of {listed}, or give a newer table.")  # fmt: skip
    return asked[0]


@dataclass(frozen=True)
class Estimate:
    """What one machine would need for a training: a range, never a promise."""

    machine: Machine
    profile: str
    gib: float
    """At the peak of a step, predicted."""
    hours: tuple[float, float]
    """At the high share of the peak, and at the low one; with the start of the machine."""

    def usd(self, *, spot: bool) -> tuple[float, float] | None:
        """What these hours cost; none where it is not sold so."""
        price = self.machine.price(spot=spot)
        return None if price is None else (price * self.hours[0], price * self.hours[1])

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        costs = {"usd": self.usd(spot=False), "usd_spot": self.usd(spot=True)}
        own = {"profile": self.profile, "gib": self.gib, "hours": self.hours}
        return self.machine.model_dump(mode="json", exclude={"regions"}) | own | costs

    def line(self) -> str:
        """Return it as a row of a table."""
        row = self.machine
        costs = [self.usd(spot=spot) for spot in (False, True)]
        demand, spot = ("-" if c is None else f"{c[0]:.2f} to {c[1]:.2f}" for c in costs)
        hours = f"{self.hours[0]:.2f} to {self.hours[1]:.2f}"
        stale = f"  (price of {row.as_of})" * row.stale()
        return (f"{row.machine:<15}{row.count} x {row.accelerator:<19}{self.profile:<8}"
                f"{self.gib:>5.1f} of {row.memory_gib:<6}{hours:>16}{demand:>18}{spot:>16}{stale}"
                )  # fmt: skip


HEADER = (f"{'machine':<15}{'GPU':<23}{'profile':<8}{'GiB at peak':>14}{'hours':>17}"
          f"{'USD, on demand':>18}{'USD, spot':>16}")  # fmt: skip


def operations(experiment: Experiment, *, weights: int, trained: int) -> float:
    """Floating point operations of a whole training on full rows.

    Six a token and trained weight, four a token and frozen one: forward, and the gradient that
    passes through; a forward more, two, where activations are recomputed (Kaplan et al. 2020,
    https://arxiv.org/abs/2001.08361). Attention among tokens is left out: rows are short.
    Raises: GemmateError for a length in epochs, which hangs on the rows.
    """
    training = experiment.training
    if training.max_steps < 0:
        raise GemmateError("How many steps num_epochs comes to is not known. Set max_steps.")
    frozen = 0 if experiment.method == "full" else weights
    each = 4 * frozen + 6 * trained + 2 * weights * training.gradient_checkpointing
    rows = training.batch_size * training.gradient_accumulation_steps
    return float(training.max_steps * rows * experiment.dataset.max_length * each)


def estimate(
    name: str, *, profile: str = "auto", overrides: Iterable[str] = (),
    table: Iterable[Machine] | None = None,
) -> list[Estimate]:  # fmt: skip
    """What each machine that an experiment fits would need, the least memory first.

    Each machine gets the settings that its GPU would choose; several GPUs share the rows of a step,
    so a machine whose GPUs cannot share them is left out.
    Raises: GemmateError where it fits none, or its shape cannot be had.
    """
    from gemmate_lib.doctor import USABLE, shape_of
    from gemmate_lib.footprint import count, predict
    from gemmate_lib.fourbit import predict_bytes

    found, counts = [], {}
    for row in read_prices() if table is None else table:
        chosen = resolve_on(row, name, profile=profile, overrides=overrides)
        experiment = on_cuda(chosen)
        if not shareable(experiment, row.count):
            continue
        config, key = shape_of(experiment.model), experiment.model.compute_dtype
        if key not in counts:
            counts[key] = count(config, experiment)
        gib = predict(experiment, config, counts[key]).total / 2**30
        if gib > USABLE["cuda"] * row.memory_gib:
            continue
        weights = predict_bytes(config, "none", dtype="float32") // 4
        done = operations(experiment, weights=weights, trained=counts[key].trained)
        speed = row.count * row.tflops * 1e12 * 3600
        low, high = (STARTUP + done / (speed * share) for share in reversed(SHARES))
        found.append(Estimate(row, experiment.profile, gib, (low, high)))
    if not found:
        raise GemmateError(f"{name} fits no machine of the table. Set model.quantization=nf4, "
                           "a smaller batch_size, or gradient_checkpointing=true.")  # fmt: skip
    return sorted(found, key=lambda each: (each.machine.memory_gib, each.machine.count))


def resolve_on(
    machine: Machine, name: str, *, profile: str = "auto", overrides: Iterable[str] = ()
) -> Experiment:
    """The experiment as it is for a machine's GPU, whatever this machine has or is told."""
    chosen, _ = choose_profile(machine.facts, profile, environ={})
    return resolve(name, facts=machine.facts, profile=chosen, overrides=list(overrides)).experiment


def shareable(experiment: Experiment, processes: int) -> bool:
    """Whether the rows of a step can be shared by so many GPUs."""
    from gemmate_lib.sharing import shares

    training = experiment.training
    try:
        shares(training.batch_size, training.gradient_accumulation_steps, processes)
    except GemmateError:
        return False
    return True


def on_cuda(experiment: Experiment) -> Experiment:
    """The experiment as it computes on a GPU, whatever the machine that plans it has."""
    if experiment.model.device == "cuda":
        return experiment
    model = experiment.model.model_copy(update={"device": "cuda"})
    return experiment.model_copy(update={"model": model})


def assumptions() -> list[str]:
    """What an estimate takes for granted, to print beside it."""
    low, high = (f"{share:.0%}" for share in SHARES)
    return [
        f"hours: rows of full length, {low} to {high} of the GPU's peak, {STARTUP:g} h to start;",
        "no evaluations, no checkpoints, no downloads of a large base. Rough by nature.",
        f"USD: Vertex AI's rates of the day given in {TABLE.name}; check before you rely on them.",
    ]


def warning(rows: Iterable[Machine]) -> list[str]:
    """A line where prices are older than `STALE` days, else none."""
    old = sorted({row.as_of for row in rows if row.stale()})
    said = f"warning: prices from {old[0]} on are over {STALE} days old" if old else ""
    return [f"{said}: look them up before you rely on them."] if old else []


def report(estimates: list[Estimate]) -> list[str]:
    """Estimates for people, with what they take for granted."""
    rows = [each.line() for each in estimates]
    return [HEADER, *rows, *assumptions(), *warning(each.machine for each in estimates)]


def listing(rows: Iterable[Machine]) -> list[str]:
    """The table of prices for people."""
    rows = list(rows)
    lines = [f"{'machine':<15}{'GPU':<23}{'GiB':>6}{'TFLOPS':>8}{'USD/h':>9}{'spot':>8}  as of"]
    for row in rows:
        demand, spot = ("-" if p is None else f"{p:.2f}" for p in (row.usd, row.usd_spot))
        lines.append(f"{row.machine:<15}{row.count} x {row.accelerator:<19}{row.memory_gib:>6}"
                     f"{row.tflops:>8g}{demand:>9}{spot:>8}  {row.as_of}")  # fmt: skip
    source = "in us-central1; https://cloud.google.com/vertex-ai/pricing has those of today"
    return [*lines, source, *warning(rows)]
