"""What a model writes when it is asked: one record for each row, with what is counted in it."""

from collections.abc import Callable
from typing import Any

from gemmate_lib import metrics as m
from gemmate_lib.data import Row
from gemmate_lib.generate import Completion

PROMPT_WORDS = 4  # of a held-out quote; what follows them is the model's own
Write = Callable[..., list[Completion]]  # generate_texts with its model, tokenizer and batch size
Records = list[dict[str, Any]]


def _predict(rows: list[Row], prompts: list[str], write: Write, length: int) -> Records:
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
        for row, done in zip(rows, write(prompts, max_new_tokens=length), strict=True)
    ]


def predict_quotes(
    rows: list[Row], tokenizer: Any, write: Write, *, length: int, train: list[Row]
) -> Records:
    """Let the model go on from the first words of each quote, and name the author of the whole.

    memorised: the longest run of words (three at least) that the first line written, prompt
    included, shares with one training quote, over the words of that line: 1 is a copy.
    shared_by_truth: the same of the true quote, which stands in no training row: chance.
    """
    starts = [" ".join(row.fields["quote"].split()[:PROMPT_WORDS]) for row in rows]
    records = _predict(rows, [f"Quote: {start}" for start in starts], write, length)
    longest_run = m.run_finder(row.fields["quote"] for row in train)

    def shared(quote: str) -> float:
        return longest_run(quote) / max(1, len(m.ngrams(quote, 1)))

    for record, row in zip(records, rows, strict=True):
        text = record["prompt"] + record["completion"]
        record["well_formed"] = m.well_formed(text)
        record["well_formed_and_stopped"] = record["well_formed"] and record["stopped"]
        record["memorised"] = shared(text.removeprefix("Quote:").partition("\n")[0])
        record["shared_by_truth"] = shared(row.fields["quote"].partition("\n")[0])
    return _name_authors(records, rows, tokenizer, write) if rows else []


def _name_authors(records: Records, rows: list[Row], tokenizer: Any, write: Write) -> Records:
    names = tokenizer([f" {row.fields['author']}" for row in rows], add_special_tokens=False)
    longest = max(map(len, names["input_ids"]))
    asked = [f"Quote: {row.fields['quote']}\nAuthor:" for row in rows]
    answers = write(asked, max_new_tokens=longest + 1)
    for record, row, answer in zip(records, rows, answers, strict=True):
        record |= {"author": row.fields["author"], "guess": m.author_of(answer.text)}
        record["author_accuracy"] = record["guess"] == record["author"]
    return records


def predict_answers(rows: list[Row], tokenizer: Any, write: Write, *, length: int) -> Records:
    """Let the model answer each prompt; rows without one (plain texts) ask nothing.

    exact_match: the same text, space at the ends and the end of a turn apart.
    """
    rows = rows if all(row.prompt for row in rows) else []
    records = _predict(rows, [row.prompt for row in rows], write, length)
    for record, row in zip(records, rows, strict=True):
        ids = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        record["expected"] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        record["exact_match"] = record["completion"].strip() == record["expected"]
    return records
