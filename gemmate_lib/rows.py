"""From a record with named fields to a row of prompt and completion, and on to token ids.

A table's form is told by its columns: `messages`; `instruction`, `output` (and `input`);
`prompt`, `completion` (or `input_text`, `output_text`); `quote`, `author` (and `tags`); `text`.
"""

import re
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gemmate_lib.config import GemmateError, among

Form = Literal["messages", "instruction", "prompt-completion", "quotes", "text"]
REQUIRED: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "quotes": ("quote", "author"),
    "text": ("text",),
}
OPTIONAL: dict[Form, tuple[str, ...]] = {"instruction": ("input",), "quotes": ("tags",)}
QUOTE_TEMPLATE = "Quote: {quote}\nAuthor: {author}"


@dataclass(frozen=True)
class Row:
    """One example: the loss is taken on the completion; `source_row` counts from 0."""

    prompt: str
    completion: str
    fields: dict[str, str]
    source_row: int


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of one row, int [T] each; -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    cut: bool


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
    record: Mapping[str, Any], form: Form, *, template: str | None, tokenizer: Any, source_row: int
) -> Row | str:
    """Make a row, or say why there is none: "missing_field", "empty", "refused_by_template"."""
    if form == "messages":
        return _render_chat(record.get("messages"), tokenizer, source_row)
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
        return Row(fields.get("prompt", ""), [*fields.values()][-1], fields, source_row)
    fields |= {name: as_text(record.get(name)) or "" for name in OPTIONAL.get(form, ())}
    fields = {name: text.strip() for name, text in fields.items()}
    if template:
        return Row("", template.format_map(fields), fields, source_row)
    given = f"\nInput: {fields['input']}" if fields["input"] else ""
    prompt = f"Instruction: {fields['instruction']}{given}\nResponse:"
    return Row(prompt, f" {fields['output']}", fields, source_row)


def _render_chat(messages: Any, tokenizer: Any, source_row: int) -> Row | str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise GemmateError("Messages need a tokenizer with a chat template. Use a chat model's.")
    turns = messages if isinstance(messages, list) else []
    if not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns):
        return "missing_field"
    last = max((i for i, t in enumerate(turns) if t.get("role") == "assistant"), default=0)
    if last == 0:  # nobody answers, or nothing was asked
        return "missing_field"
    if not turns[last]["content"].strip():
        return "empty"
    try:
        prompt = tokenizer.apply_chat_template(
            turns[:last], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(turns[: last + 1], tokenize=False)
    except TemplateError:  # e.g. Gemma knows no system role
        return "refused_by_template"
    if not whole.startswith(prompt):
        raise GemmateError("The chat template rewrites earlier turns. Use prompt and completion.")
    completion = whole[len(prompt) :].rstrip()
    fields = {"reply": turns[last]["content"]}
    return Row(prompt.removeprefix(tokenizer.bos_token or ""), completion, fields, source_row)


def encode(row: Row, tokenizer: Any, *, max_length: int, over_long: str) -> Encoded | None:
    """Encode bos + prompt + completion + eos; None where the row is too long to keep.

    The prompt is tokenised by itself, as it is at generation. `over_long="cut"` cuts the end of
    the prompt; only a completion that alone exceeds `max_length` is cut, and so loses its eos.

    Raises:
        GemmateError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise GemmateError("The tokenizer has no end-of-sequence token. Set tokenizer.eos_token.")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt, completion = (_token_ids(text, tokenizer) for text in (row.prompt, row.completion))
    if completion[-1:] != [tokenizer.eos_token_id]:
        completion.append(tokenizer.eos_token_id)
    room = max_length - len(bos) - len(completion)
    cut = room < len(prompt)
    if cut and over_long == "drop":
        return None
    prompt, completion = prompt[: max(room, 0)], completion[: max_length - len(bos)]
    masked = [-100] * (len(bos) + len(prompt))  # nothing predicts the first position
    return Encoded([*bos, *prompt, *completion], [*masked, *completion], cut)


def _token_ids(text: str, tokenizer: Any) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos == tokenizer.eos_token_id:  # GPT-2: only at the start is it a bos
        return ids[next((i for i, token in enumerate(ids) if token != bos), len(ids)) :]
    return [token for token in ids if token != bos]  # pre-rendered text brings one along
