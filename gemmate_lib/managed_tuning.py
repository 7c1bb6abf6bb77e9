"""Gemini's managed tuning: our rows in its format, checked, and the call that would be made.

Gemini's weights are not given out, so PEFT can put no LoRA on them. Instead Google trains an
adapter for you inside Vertex AI, from a file of conversations in a bucket; what comes back is an
endpoint, not a file. Source: https://cloud.google.com/vertex-ai/generative-ai/docs/models/gemini-tuning
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gemmate_lib.config import GemmateError
from gemmate_lib.extras import need
from gemmate_lib.formats import read_table, rename_columns, usual_columns, write_rows
from gemmate_lib.forms import Form, find_form, render
from gemmate_lib.remote import check_bucket

# As documented for Gemini 2.5 in 2025: look them up for your model before you rely on them.
MODEL = "gemini-2.5-flash"
MAX_TOKENS, CHARACTERS = 131_072, 4  # of an example; characters of a token, roughly
MAX_EXAMPLES, MAX_BYTES, FEW = 1_000_000, 10**9, 100
ADAPTER_SIZES = {1: "ONE", 2: "TWO", 4: "FOUR", 8: "EIGHT", 16: "SIXTEEN"}
_ROLES = {"user": "user", "human": "user", "assistant": "model", "model": "model"}
Example = dict[str, Any]


class Converted(NamedTuple):
    """What a file came to."""

    examples: int
    tokens: int
    """Roughly, at `CHARACTERS` characters each."""

    def lines(self) -> list[str]:
        """Return it for people."""
        few = f"fewer than the {FEW} that are advised: " * (self.examples < FEW)
        return [f"{self.examples:,} examples ({few}quality counts), about {self.tokens:,} tokens"]


def convert_file(
    source: str | Path, out: str | Path, *, system: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Converted:  # fmt: skip
    """Convert rows of any form with a prompt to Gemini's format, and check what came out.

    system: an instruction that goes before every conversation without one of its own.
    columns: our name -> the file's.
    Raises: GemmateError naming the row that cannot be converted.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".jsonl":
        raise GemmateError(f"Gemini reads JSON Lines. Name {out.name} with .jsonl at its end.")
    table = rename_columns({"train": read_table(source)}, columns or {})
    form, _ = find_form(usual_columns(table), mapped=columns or {}, template=None)
    examples = [
        to_example(record, form, number=number, system=system)
        for number, record in enumerate(table["train"])
    ]
    found = check_examples(examples)
    write_rows(out, examples)
    return found


def to_example(
    record: Mapping[str, Any], form: Form, *, number: int, system: str | None = None
) -> Example:
    """One record as a conversation. Raises: GemmateError naming the row where it is none."""
    if form == "messages":
        instruction, turns = _turns(record, number)
    else:
        row = render(record, form, template=None, tokenizer=None, source_row=number)
        if isinstance(row, str):
            raise GemmateError(f"Row {number}: {row.replace('_', ' ')}. Mend it, or leave it out.")
        if not row.prompt.strip():
            problem = f"Row {number} has no prompt, and Gemini is tuned on conversations"
            raise GemmateError(f"{problem}. Give the columns prompt and completion.")
        instruction, turns = None, [("user", row.prompt), ("model", row.completion.strip())]
    contents = [{"role": role, "parts": [{"text": text}]} for role, text in turns]
    example: Example = {"contents": contents}
    if told := instruction or system:
        example = {"systemInstruction": {"role": "system", "parts": [{"text": told}]}} | example
    return example


def _turns(record: Mapping[str, Any], number: int) -> tuple[str | None, list[tuple[str, str]]]:
    """The instruction of a conversation, and its turns in Gemini's roles."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise GemmateError(f"Row {number}: messages are no list of turns. Mend it.")
    told = [str(m.get("content")) for m in messages if m.get("role") == "system"]
    turns = [m for m in messages if m.get("role") != "system"]
    for turn in turns:
        if turn.get("role") not in _ROLES:
            known = ", ".join(("system", *_ROLES))
            raise GemmateError(f"Row {number}: {turn.get('role')!r} is no role. Known: {known}.")
    return "\n".join(told) or None, [(_ROLES[t["role"]], str(t.get("content"))) for t in turns]


def check_file(path: str | Path) -> Converted:
    """Check a file in Gemini's format. Raises: GemmateError naming the row that is wrong."""
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise GemmateError(f"{path} has over {MAX_BYTES:,} bytes. Take fewer examples.")
    return check_examples(read_table(path))


def check_examples(examples: Iterable[Example]) -> Converted:
    """Check conversations in Gemini's format. Raises: GemmateError naming the row that is wrong."""
    count = characters = 0
    for number, example in enumerate(examples):
        own = sum(len(text) for text in _checked(example, number))
        if own > MAX_TOKENS * CHARACTERS:
            problem = f"Row {number} has about {own // CHARACTERS:,} tokens of {MAX_TOKENS:,}"
            raise GemmateError(f"{problem}. Shorten it, or leave it out.")
        count, characters = count + 1, characters + own
    if not 0 < count <= MAX_EXAMPLES:
        raise GemmateError(f"There are {count:,} examples. Give 1 to {MAX_EXAMPLES:,}.")
    return Converted(count, characters // CHARACTERS)


def _checked(example: Example, number: int) -> Iterator[str]:
    """The texts of a conversation whose turns alternate and end with the model's."""
    contents = example.get("contents") if isinstance(example, dict) else None
    if not isinstance(contents, list) or not contents:
        raise GemmateError(f"Row {number} has no list `contents`. Convert it with: gemmate cloud "
                           "convert")  # fmt: skip
    for place, turn in enumerate(contents):
        expected = ("user", "model")[place % 2]
        if not isinstance(turn, dict) or turn.get("role") != expected:
            said = turn.get("role") if isinstance(turn, dict) else turn
            raise GemmateError(f"Row {number}, turn {place} is of {said!r}, not {expected!r}: user "
                               "and model take turns, and user begins. Mend it.")  # fmt: skip
    if len(contents) % 2:
        raise GemmateError(f"Row {number} does not end with the model's turn, from which it would "
                           "learn. Add it.")  # fmt: skip
    extra = [example["systemInstruction"]] if "systemInstruction" in example else []
    for turn in (*extra, *contents):
        yield _text(turn, number)


def _text(turn: Any, number: int) -> str:
    try:
        text = "".join(part["text"] for part in turn["parts"])
        text.encode()  # half a character, from a JSON string that was cut, is no UTF-8
    except (LookupError, TypeError, UnicodeEncodeError):
        raise GemmateError(f"Row {number} has a turn whose parts are no text. Mend it.") from None
    if not text.strip():
        raise GemmateError(f"Row {number} has an empty turn. Fill it, or leave the row out.")
    return text


def tuning_call(
    train: str,
    *,
    validation: str | None = None,
    model: str = MODEL,
    name: str = "gemmate",
    epochs: int | None = None,
    adapter_size: int = 4,
) -> dict[str, Any]:
    """What `client.tunings.tune(**call)` is given, made without network or account.

    train, validation: URLs of files in a bucket. epochs: none: as Google finds best.
    Raises: GemmateError for a URL that is none, an unknown adapter size, or google-genai missing.
    """
    need("google.genai", "Managed tuning", extra="cloud")
    from google.genai import types

    if adapter_size not in ADAPTER_SIZES:
        sizes = ", ".join(map(str, ADAPTER_SIZES))
        raise GemmateError(f"There is no adapter of size {adapter_size}. Choose one of {sizes}.")
    for url in filter(None, (train, validation)):
        if not check_bucket(url).endswith(".jsonl"):
            raise GemmateError(f"{url} is no .jsonl file in a bucket. Copy one there first.")
    config = types.CreateTuningJobConfig(
        tuned_model_display_name=name,
        epoch_count=epochs,
        adapter_size=types.AdapterSize[f"ADAPTER_SIZE_{ADAPTER_SIZES[adapter_size]}"],
        validation_dataset=types.TuningValidationDataset(gcs_uri=validation)
        if validation
        else None,
    )
    return {"base_model": model, "training_dataset": types.TuningDataset(gcs_uri=train),
            "config": config}  # fmt: skip


def shown(call: Mapping[str, Any]) -> str:
    """The call as JSON, to look at."""
    plain = {
        key: value if isinstance(value, str) else value.model_dump(mode="json", exclude_none=True)
        for key, value in call.items()
    }
    return json.dumps(plain, indent=1)
