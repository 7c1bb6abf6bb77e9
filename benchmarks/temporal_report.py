"""What the runs of `temporal.py` show: tables for people, and whether the claims hold."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemmate_lib.stats import bootstrap, over_seeds, paired_bootstrap, wilson

REQUIRED = {
    "date": 0.99, "weekday": 0.99, "time": 0.99, "year": 0.99, "yesterday": 0.98, "tomorrow": 0.98,
    "a week ago": 0.98, "in ten days": 0.98, "a month ago": 0.98, "holiday": 0.98,
}  # fmt: skip
RELATIVE = ("yesterday", "tomorrow", "a week ago", "in ten days", "a month ago")
GROUPS = {
    "date": ("date",), "weekday": ("weekday",), "time": ("time",), "year": ("year",),
    "relative": RELATIVE, "holiday": ("holiday",),
}  # fmt: skip
Results = Mapping[str, Mapping[str, Any]]


def report(results: Results) -> dict[str, Any]:
    """Everything that the runs show, ready for JSON."""
    found: dict[str, Any] = {"headline": {}, "questions": {}, "language": {}}
    for name, result in results.items():
        part, _, rest = name.partition(" ")
        if part == "headline":
            found["headline"][rest] = {
                "training_s": result["seconds"],
                "exact_match": {
                    place: {kind: hits / n for kind, (hits, n) in kinds.items()}
                    for place, kinds in result["exam"].items()
                },
                "n": max(n for kinds in result["exam"].values() for _, n in kinds.values()),
            } | {key: value for key, value in result.items() if key.startswith("general")}
    arms = {name.split(" ")[1] for name in results if name.startswith("questions ")}
    for arm in sorted(arms):
        seeds = [r for n, r in results.items() if n.startswith(f"questions {arm} ")]
        found["questions"][arm] = _scores([seed["exam"] for seed in seeds]) | {"seeds": len(seeds)}
    for data in ("drift", "events"):
        runs: dict[str, list[Mapping[str, Any]]] = {}
        for name, result in results.items():
            if name.startswith(f"{data} "):
                runs.setdefault(name.split(" ")[1], []).append(result["losses"])
        if runs:
            found["language"][data] = _language(runs)
    return found


def _scores(exams: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Exact match by group of kinds, in seen and in held-out years, all seeds and splits pooled."""
    scores: dict[str, Any] = {}
    for years in ("seen", "held-out"):
        for group, kinds in GROUPS.items():
            pairs = [
                exam[place][kind] for exam in exams for place in exam if place.startswith(years)
                for kind in kinds
            ]  # fmt: skip
            share = wilson(sum(hits for hits, _ in pairs), sum(n for _, n in pairs))
            scores[f"{group}, {years} years"] = [share.value, share.low, share.high]
    return scores


def _language(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Mean loss of each arm and time, and what the true time gains: nats a text, with intervals.

    An arm that was trained several times has the mean of its losses, text by text; its gain over
    trainings takes each of them for one value, and tells how far the next might be off.
    """
    losses = {
        f"{arm}, {time}": np.mean([seed[time] for seed in seeds], axis=0)
        for arm, seeds in runs.items() for time in seeds[0]
    }  # fmt: skip
    trained: dict[str, list[float]] = {}
    found: dict[str, Any] = {"loss": {}, "gain": {}, "gain over trainings": trained}
    for name, values in losses.items():
        mean = bootstrap(values)
        time = name.split(", ")[1]  # what is best is the same for every arm
        label = time if time.startswith("best") else name
        found["loss"][label] = [mean.value, mean.low, mean.high]
    for arm in ("calendar", "era"):
        rivals = (f"{arm}, shuffled", f"{arm}, missing", "none, true", "text, true",
                  "text, shuffled")  # fmt: skip
        for name in (r for r in rivals if arm in runs and r in losses):
            true = losses[f"{arm}, true"]
            gain = paired_bootstrap(losses[name], true, higher_is_better=False).difference
            found["gain"][f"{arm}, true against {name}"] = [gain.value, gain.low, gain.high]
            rival, time = name.split(", ")
            if len(runs[arm]) == len(runs[rival]) > 1:  # seed by seed: the same rows in their order
                pairs = zip(runs[arm], runs[rival], strict=True)
                each = over_seeds([np.mean(a["true"]) - np.mean(b[time]) for a, b in pairs])
                trained[f"{arm}, true against {name}"] = [each.value, each.low, each.high]
    found["seeds"] = {
        arm: [float(np.mean(s["true"])) for s in seeds] for arm, seeds in runs.items()
    }
    found["n"] = len(next(iter(losses.values())))
    return found


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables in Markdown."""
    for name, run in found["headline"].items():
        seconds = f"{run['training_s']:.0f} s of training"
        yield f"\ncalendar, {name}: {seconds}, {run['n']} questions of each kind\n"
        places = run["exact_match"]
        yield "| question | " + " | ".join(places) + " | required |"
        yield "| --- " * (len(places) + 2) + "|"
        for kind in next(iter(places.values())):
            shares = " | ".join(f"{kinds[kind]:.3f}" for kinds in places.values())
            yield f"| {kind} | {shares} | {REQUIRED.get(kind, '')} |"
        lost = ", ".join(f"{k.split(', ')[1]} {v:.3g}" for k, v in run.items() if "general" in k)
        yield f"\ngeneral perplexity: {lost}"
    if found["questions"]:
        yield "\nexact match, seen / held-out years, every encoding trained alike\n"
        yield "| encoding | seeds | " + " | ".join(GROUPS) + " |"
        yield "| --- " * (len(GROUPS) + 2) + "|"
        for arm, scores in found["questions"].items():
            both = (
                " / ".join(f"{scores[f'{group}, {y} years'][0]:.2f}" for y in ("seen", "held-out"))
                for group in GROUPS
            )
            yield f"| {arm} | {scores['seeds']} | " + " | ".join(both) + " |"
    for data, part in found["language"].items():
        yield f"\n{data}: nats a text, {part['n']} texts\n"
        yield "| | mean | 95 % |\n| --- | --- | --- |"
        for name, (value, low, high) in (part["loss"] | part["gain"]).items():
            yield f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} |"
        for name, (value, low, high) in part["gain over trainings"].items():
            yield f"| {name}, over trainings | {value:.3f} | {low:.3f} to {high:.3f} |"
        for arm, means in part["seeds"].items():
            if len(means) > 1:
                yield f"| {arm}, true, each training | {', '.join(f'{m:.2f}' for m in means)} | |"
    if cost := found.get("cost"):
        yield "\nwhat it costs, against the base\n"
        yield "| | ratio | range |\n| --- | --- | --- |"
        for name, values in cost.items():
            if isinstance(values, list):
                yield f"| {name} | {values[0]:.3f} | {values[1]:.3f} to {values[2]:.3f} |"
            else:
                yield f"| {name} | {values} | |"


def readme_tables(found: Mapping[str, Any]) -> dict[str, str]:
    """The README's generated blocks, by their names."""
    return {"temporal": _questions_table(found), "events": _events_table(found)}


def _events_table(found: Mapping[str, Any]) -> str:
    """What the true time saves on real events, with intervals over texts and over trainings."""
    part = found["language"]["events"]
    rivals = {
        "a shuffled time": "era, shuffled", "no time": "era, missing",
        "a model trained without any time": "none, true",
        "a model that has the date in its prompt": "text, true",
    }  # fmt: skip
    rows = ["| in place of | nats a text, 95 % over texts | 95 % over trainings |"]
    rows.append("| --- | ---: | ---: |")
    for what, rival in rivals.items():
        name = f"era, true against {rival}"
        (value, low, high), (_, least, most) = part["gain"][name], part["gain over trainings"][name]
        saved = f"{-value:.2f} ({-high:.2f} to {-low:.2f})"
        rows.append(f"| {what} | {saved} | {-most:.2f} to {-least:.2f} |")
    return "\n".join(rows)


def _questions_table(found: Mapping[str, Any]) -> str:
    """Right answers in years that training never saw."""
    rows = ["| right answers in held-out years | " + " | ".join(GROUPS) + " |"]
    rows.append("| --- |" + " ---: |" * len(GROUPS))
    order = ("none", "log", "signed_log", "fourier", "learned_fourier", "text", "calendar")
    for arm in order:
        shares = (found["questions"][arm][f"{group}, held-out years"][0] for group in GROUPS)
        name = "log (the original)" if arm == "log" else arm
        rows.append(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    for name, run in found["headline"].items():
        places = [kinds for place, kinds in run["exact_match"].items() if "held-out" in place]
        shares = (
            sum(kinds[k] for kinds in places for k in GROUPS[group])
            / (len(places) * len(GROUPS[group]))
            for group in GROUPS
        )
        rows.append(
            f"| calendar, {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |"
        )
    return "\n".join(rows)


def failures(found: Mapping[str, Any]) -> list[str]:
    """What was claimed and does not hold.

    One headline that reaches every number is enough, and so is, for each kind of language, one
    encoding whose true time gains on every other time and on none.
    """
    missed = []
    for name, run in found["headline"].items():
        missed.append([
            f"{name}: {kind} {kinds[kind]:.3f} in {place}, required {least}"
            for place, kinds in run["exact_match"].items()
            for kind, least in REQUIRED.items() if kinds[kind] < least
        ])  # fmt: skip
    said = [] if [] in missed else [line for lines in missed for line in lines]
    for data, part in found["language"].items():
        lost: dict[str, list[str]] = {}
        for name, (_, _, high) in part["gain"].items():
            lost.setdefault(name.split(",")[0], [])
            if " text," not in name and high >= 0:
                lost[name.split(",")[0]].append(f"{data}: {name} shows no gain")
        if [] not in lost.values():
            said += [line for arm in lost.values() for line in arm]
    return said
