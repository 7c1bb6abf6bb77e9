"""What a model writes when it is asked: one record for each row, with what is counted in it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from gemmate_lib import metrics as m
from gemmate_lib import squad
from gemmate_lib.classification import parse_label
from gemmate_lib.data import Row
from gemmate_lib.forms import UNANSWERABLE, label_answer
from gemmate_lib.generate import Completion
from gemmate_lib.rows import fit, windows

PROMPT_WORDS = 4  # of a held-out quote; what follows them is the model's own
STRIDE = 64  # tokens of a context that two windows share: more than an answer has
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Asker:
    """A model as evaluation asks it; no answer depends on the others.

    write: `generate_texts` with its model, tokenizer and batch size.
    score: log p of each row's completion, EOS included, in nats: float64 [N].
    """

    write: Callable[..., list[Completion]]
    score: Callable[[list[Row]], np.ndarray]
    tokenizer: Any
    max_length: int
    max_new_tokens: int


def _predict(rows: list[Row], prompts: list[str], asker: Asker) -> Records:
    times = [row.timestamp for row in rows]
    answers = asker.write(prompts, max_new_tokens=asker.max_new_tokens, timestamps=times)
    return [
        {
            "source_row": row.source_row,
            "prompt": done.prompt,
            "completion": done.text,
            "length": done.n_tokens,
            "stopped": done.stopped,
            "repetition": m.repetition(done.text),
            "html": m.html_tags(done.text) > 0,
        }
        for row, done in zip(rows, answers, strict=True)
    ]


def predict_quotes(rows: list[Row], asker: Asker, *, train: list[Row]) -> Records:
    """Let the model go on from the first words of each quote, and name the author of the whole.

    memorised: the longest run of words (three at least) that the first line written, prompt
    included, shares with one training quote, over the words of that line: 1 is a copy.
    shared_by_truth: the same of the true quote, which stands in no training row: chance.
    """
    starts = [" ".join(row.fields["quote"].split()[:PROMPT_WORDS]) for row in rows]
    records = _predict(rows, [f"Quote: {start}" for start in starts], asker)
    longest_run = m.run_finder(row.fields["quote"] for row in train)

    def shared(quote: str) -> float:
        return longest_run(quote) / max(1, len(m.ngrams(quote, 1)))

    for record, row in zip(records, rows, strict=True):
        text = record["prompt"] + record["completion"]
        record["well_formed"] = m.well_formed(text)
        record["well_formed_and_stopped"] = record["well_formed"] and record["stopped"]
        record["memorised"] = shared(text.removeprefix("Quote:").partition("\n")[0])
        record["shared_by_truth"] = shared(row.fields["quote"].partition("\n")[0])
    return _name_authors(records, rows, asker) if rows else []


def _name_authors(records: Records, rows: list[Row], asker: Asker) -> Records:
    names = asker.tokenizer([f" {row.fields['author']}" for row in rows], add_special_tokens=False)
    longest = max(map(len, names["input_ids"]))
    asked = [f"Quote: {row.fields['quote']}\nAuthor:" for row in rows]
    times = [row.timestamp for row in rows]
    answers = asker.write(asked, max_new_tokens=longest + 1, timestamps=times)
    for record, row, answer in zip(records, rows, answers, strict=True):
        record |= {"author": row.fields["author"], "guess": m.author_of(answer.text)}
        record["author_accuracy"] = record["guess"] == record["author"]
    return records


def predict_answers(rows: list[Row], asker: Asker) -> Records:
    """Let the model answer each prompt; rows without one (plain texts) ask nothing.

    exact_match: the same text, space at the ends and the end of a turn apart.
    """
    rows = rows if all(row.prompt for row in rows) else []
    records = _predict(rows, [row.prompt for row in rows], asker)
    for record, row in zip(records, rows, strict=True):
        ids = asker.tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        record["expected"] = asker.tokenizer.decode(ids, skip_special_tokens=True).strip()
        record["exact_match"] = record["completion"].strip() == record["expected"]
    return records


def predict_labels(rows: list[Row], asker: Asker, *, labels: Sequence[str]) -> Records:
    """Let the model label each text, and say how likely it holds each label.

    A review that is too long is cut for the longest label, so that the cut gives nothing away. An
    answer that parses to no label is unparsed, and so is wrong. probabilities: of the labels' whole
    answers, as shares of one.
    """
    answers = [label_answer(label) for label in labels]
    sizes = [len(ids) for ids in asker.tokenizer(answers, add_special_tokens=False)["input_ids"]]
    longest = answers[int(np.argmax(sizes))]
    fitted = [
        fit(replace(row, completion=longest), asker.tokenizer, max_length=asker.max_length)
        for row in rows
    ]
    records = _predict(fitted, [row.prompt for row in fitted], asker)
    asked = [replace(row, completion=answer) for row in fitted for answer in answers]
    scores = asker.score(asked).reshape(len(rows), len(labels))
    shares = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
    for record, row, share in zip(records, rows, shares.tolist(), strict=True):
        label = parse_label(record["completion"], labels)
        record |= {"expected": row.fields["label"], "predicted": label, "unparsed": label is None}
        record["accuracy"] = label == record["expected"]
        record["probabilities"] = dict(zip(labels, share, strict=True))
    return records


def predict_spans(rows: list[Row], asker: Asker) -> Records:
    """Let the model answer from each paragraph, by a window that slides where it is too long.

    no_answer: the probability of "unanswerable", in the window that is surest of an answer. That
    window answers, of those that answer at all; "" where none does. exact, f1: as SQuAD v2 scores.
    """
    asked = [replace(row, completion=f" {UNANSWERABLE}") for row in rows]
    shape = {"max_length": asker.max_length, "stride": STRIDE}
    parts = [(i, w) for i, row in enumerate(asked) for w in windows(row, asker.tokenizer, **shape)]
    shown = [window for _, window in parts]
    found = _predict(shown, [window.prompt for window in shown], asker)
    chances = np.exp(asker.score(shown)).tolist() if shown else []
    for record, chance in zip(found, chances, strict=True):
        text = record["completion"].strip()
        record |= {"answer": "" if text == UNANSWERABLE else text, "no_answer": chance}
    records: Records = []
    numbered = zip((i for i, _ in parts), found, strict=True)
    for i, group in groupby(numbered, key=lambda pair: pair[0]):
        several = [record for _, record in group]
        best = min(several, key=lambda record: (not record["answer"], record["no_answer"]))
        golds = json.loads(rows[i].fields["golds"])
        best |= {"golds": golds, "windows": len(several)}
        best["no_answer"] = min(record["no_answer"] for record in several)
        best["exact"] = squad.exact(best["answer"], golds) == 1
        best["f1"] = squad.f1(best["answer"], golds)
        records.append(best)
    return records
