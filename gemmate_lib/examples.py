"""A row as people read it: what it asks, what it answers, and its class, whatever the form."""

from typing import Any, NamedTuple

from gemmate_lib.config import DatasetConfig, GemmateError
from gemmate_lib.data import Form, read_tables
from gemmate_lib.formats import rename_columns, usual_columns
from gemmate_lib.forms import UNANSWERABLE, find_form, render


class Example(NamedTuple):
    """What a row asks and answers, without the words that frame it.

    label: its class, if it has one. context: the paragraph that several rows may ask about.
    """

    row: int
    asked: str
    answered: str
    label: str | None = None
    context: str = ""

    @property
    def text(self) -> str:
        """Question and answer: what a row has of its own."""
        return f"{self.asked}\n{self.answered}".strip()

    @property
    def whole(self) -> str:
        """All that a model reads and writes of it."""
        return f"{self.context}\n{self.text}".strip()


def read_examples(
    config: DatasetConfig,
) -> tuple[list[dict[str, Any]], Form, list[Example]]:
    """Return the train records, their form, and an example for each that can be used.

    Raises: GemmateError where there is none.
    """
    tables = rename_columns({"train": read_tables(config)["train"]}, config.columns)
    records, columns = tables["train"], usual_columns(tables)
    form, _ = find_form(columns, mapped=config.columns, template=config.template)
    found = [_example(record, form, config, row) for row, record in enumerate(records)]
    examples = [each for each in found if each is not None]
    if not examples:
        raise GemmateError(f"{config.id} has no row of the form {form} with text. Mend the file.")
    return records, form, examples


def _example(record: Any, form: Form, config: DatasetConfig, row: int) -> Example | None:
    if form == "messages":
        return _chat(record.get("messages"), row)
    found = render(
        record, form, template=config.template, tokenizer=None, source_row=row, labels=config.labels
    )
    if isinstance(found, str):
        return None
    fields = found.fields
    if form == "classification":
        return Example(row, fields["sentence"], fields["label"], fields["label"])
    if form == "instruction":
        asked = "\n".join(filter(None, [fields["instruction"], fields["input"]]))
        return Example(row, asked, fields["output"])
    if form == "reading":
        said = found.completion.strip()
        label = UNANSWERABLE if said == UNANSWERABLE else "answerable"
        return Example(row, fields["question"], said, label, fields["context"])
    if form == "quotes":
        return Example(row, fields["quote"], fields["author"], fields["author"])
    return Example(row, found.prompt, found.completion, found.completion if found.prompt else None)


def _chat(messages: Any, row: int) -> Example | None:
    """The last answer, and what stands before it; no template is needed to measure."""
    turns = messages if isinstance(messages, list) else []
    found = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    said = [text for text in found if isinstance(text, str)]
    if len(said) != len(turns) or len(said) < 2:
        return None
    return Example(row, "\n".join(said[:-1]), said[-1])
