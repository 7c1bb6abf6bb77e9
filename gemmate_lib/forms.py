"""From a record with named fields to a row of prompt and completion.

A table's form is told by its columns: `messages`; `instruction`, `output` (and `input`);
`prompt`, `completion` (or `input_text`, `output_text`); `quote`, `author` (and `tags`);
`context`, `question`, `answers`; `sentence`, `label`; `text`.
"""

import json
import re
import string
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from gemmate_lib import timestamps
from gemmate_lib.config import GemmateError, among
from gemmate_lib.rows import Row, Soft, Times
from gemmate_lib.timestamps import MISSING

Form = Literal[
    "messages", "instruction", "prompt-completion", "quotes", "reading", "classification", "text"
]
REQUIRED: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "quotes": ("quote", "author"),
    "reading": ("context", "question", "answers"),
    "classification": ("sentence", "label"),
    "text": ("text",),
}
OPTIONAL: dict[Form, tuple[str, ...]] = {"instruction": ("input",), "quotes": ("tags",)}
QUOTE_TEMPLATE = "Quote: {quote}\nAuthor: {author}"
UNANSWERABLE = "unanswerable"
# How published instructions say that there is no text: "<noinput>", "<nooutput>", "No input".
_NOTHING = re.compile(r"<\s*no\s*(input|output)\s*>|no (input|output)", re.IGNORECASE)


def find_form(
    columns: Collection[str], *, mapped: Collection[str], template: str | None
) -> tuple[Form, tuple[str, ...]]:
    """Tell the form and its required fields from the columns; a template names its own.

    Raises:
        GemmateError: no form has these columns, or the template is malformed.
    """
    if template is not None:
        names = tuple(among(name, columns, "column") for name in _placeholders(template))
        return ("quotes" if {"quote", "author"} <= set(names) else "text"), names
    for form, required in REQUIRED.items():
        if set(required) <= set(columns) and set(mapped) <= {*required, *OPTIONAL.get(form, ())}:
            return form, required
    forms = "; ".join(" + ".join(required) for required in REQUIRED.values())
    raise GemmateError(
        f"The columns {sorted(columns)} match no form ({forms}). "
        'Map them, e.g. columns="quote=content author=author", or give a template.'
    )


def _placeholders(template: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise GemmateError(f"The template {template!r}: {error}. Mend it.") from error
    if not names:
        raise GemmateError(f"The template {template!r} names no column. Write one as {{text}}.")
    return list(dict.fromkeys(names))


def as_text(value: Any) -> str | None:
    """Return a field as text, the items of a list joined by commas; None for what holds none."""
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(map(str, value))
    if not isinstance(value, str | int | float) or value != value:  # only NaN differs from itself
        return None
    # Half a character, from a JSON string that was cut: no tokenizer takes it.
    return None if re.search("[\ud800-\udfff]", str(value)) else str(value)


def render(
    record: Mapping[str, Any],
    form: Form,
    *,
    template: str | None,
    tokenizer: Any,
    source_row: int,
    timestamp: str | None = None,
    labels: Mapping[str, str] | None = None,
    chat: bool = False,
) -> Row | str:
    """Make a row, or say why there is none: "missing_field", "empty", "refused_by_template".

    timestamp: the field that says when; in messages a turn may have its own.
    labels: what a label of the table is called; a row with another one is left out.
    chat: an instruction is put by the tokenizer's own chat template.
    Raises: GemmateError for a time that cannot be read.
    """
    moment = MISSING if timestamp is None else _moment(record, timestamp, source_row)
    if form == "messages":
        messages = record.get("messages")
        return _render_chat(messages, tokenizer, source_row, timestamp, moment)
    times = None if timestamp is None else ((0, moment),)
    if form == "reading":
        return _render_reading(record, source_row, times)
    if form == "classification":
        return _render_label(record, labels or {}, source_row, times)
    template = template or (QUOTE_TEMPLATE if form == "quotes" else None)
    fields = {}
    for name in _placeholders(template) if template else REQUIRED[form]:
        text = as_text(record.get(name))
        if text is None:
            return "missing_field"
        if not text.strip() and name != "prompt":
            return "empty"
        fields[name] = text
    if template is None and form != "instruction":  # as they are
        return Row(fields.get("prompt", ""), [*fields.values()][-1], fields, source_row, times)
    fields |= {name: as_text(record.get(name)) or "" for name in OPTIONAL.get(form, ())}
    fields = {name: text.strip() for name, text in fields.items()}
    if template:
        return Row("", template.format_map(fields), fields, source_row, times)
    return _render_instruction(fields, chat, tokenizer, source_row, times)


def says_nothing(value: Any) -> bool:
    """Whether a field says in words that it is empty: `<noinput>`."""
    return isinstance(value, str) and _NOTHING.fullmatch(value.strip()) is not None


def _render_instruction(
    fields: dict[str, str], chat: bool, tokenizer: Any, source_row: int, times: Times
) -> Row | str:
    """Ask in plain text, or in the chat format of the tokenizer."""
    fields = {name: "" if says_nothing(text) else text for name, text in fields.items()}
    asked, given, answer = fields["instruction"], fields["input"], fields["output"]
    if not asked or not answer:
        return "empty"
    if not chat:
        given = f"\nInput: {given}" if given else ""
        prompt = f"Instruction: {asked}{given}\nResponse:"
        return Row(prompt, f" {answer}", fields, source_row, times)
    user = {"role": "user", "content": f"{asked}\n\n{given}" if given else asked}
    turns = [user, {"role": "assistant", "content": answer}]
    row = _render_chat(turns, tokenizer, source_row, None, MISSING)
    return row if isinstance(row, str) else replace(row, fields=fields, times=times)


def _render_label(
    record: Mapping[str, Any], labels: Mapping[str, str], source_row: int, times: Times
) -> Row | str:
    sentence, label = (as_text(record.get(name)) for name in REQUIRED["classification"])
    if labels:
        label = labels.get(label or "")
    if sentence is None or label is None:
        return "missing_field"
    if not (sentence := sentence.strip()) or not label.strip():
        return "empty"
    start, fields = len("Review: "), {"sentence": sentence, "label": label}
    soft = Soft(start, start + len(sentence))
    prompt = f"Review: {sentence}\nOutput:"
    return Row(prompt, label_answer(label), fields, source_row, times, soft)


def label_answer(label: str) -> str:
    """The completion that gives a label."""
    return f" {json.dumps({'label': label})}"


def _render_reading(record: Mapping[str, Any], source_row: int, times: Times) -> Row | str:
    context, question = (as_text(record.get(name)) for name in ("context", "question"))
    answers = record.get("answers")
    if context is None or question is None or not isinstance(answers, Mapping):
        return "missing_field"
    if not context.strip() or not question.strip():
        return "empty"
    golds, starts = list(answers.get("text", ())), list(answers.get("answer_start", ()))
    start, keep = len("Context: "), None
    if golds:
        at = starts[0] if starts and context.startswith(golds[0], starts[0]) else -1
        at = at if at >= 0 else context.find(golds[0])
        keep = None if at < 0 else (start + at, start + at + len(golds[0]))
    fields = {"context": context, "question": question, "golds": json.dumps(golds)}
    soft = Soft(start, start + len(context), keep)
    prompt = f"Context: {context}\nQuestion: {question.strip()}\nAnswer:"
    completion = f" {golds[0].strip() if golds else UNANSWERABLE}"
    return Row(prompt, completion, fields, source_row, times, soft)


def _moment(record: Mapping[str, Any], name: str, source_row: int, default: Any = None) -> int:
    return timestamps.parse(record.get(name, default), where=f"Row {source_row}: {name}")


def _render_chat(
    messages: Any, tokenizer: Any, source_row: int, timestamp: str | None, moment: int
) -> Row | str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise GemmateError("A chat needs a tokenizer with a chat template. Use a chat model's.")
    turns = messages if isinstance(messages, list) else []
    if not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns):
        return "missing_field"
    last = max((i for i, t in enumerate(turns) if t.get("role") == "assistant"), default=0)
    if last == 0:  # nobody answers, or nothing was asked
        return "missing_field"
    if not turns[last]["content"].strip():
        return "empty"
    write = partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        prompt = write(turns[:last], add_generation_prompt=True)
        whole = write(turns[: last + 1])
        ends = [len(write(turns[:i])) for i in range(1, last + 1)] if timestamp else []
    except TemplateError:  # e.g. Gemma knows no system role
        return "refused_by_template"
    if not whole.startswith(prompt):
        raise GemmateError("The chat template rewrites earlier turns. Use prompt and completion.")
    completion = whole[len(prompt) :].rstrip()
    fields, bos = {"reply": turns[last]["content"]}, tokenizer.bos_token or ""
    times = None
    if timestamp:  # each stretch ends where the next turn begins
        ends = [end - len(bos) * whole.startswith(bos) for end in ends]
        moments = [_moment(t, timestamp, source_row, moment) for t in turns[: last + 1]]
        times = tuple(zip([*ends, len(whole)], moments, strict=True))
    return Row(prompt.removeprefix(bos), completion, fields, source_row, times)
