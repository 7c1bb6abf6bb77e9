"""Requests in OpenAI's form: what is understood, and what is refused by name.

Nothing that would change the answer is left unread: an unknown key, or a value that this server
cannot do, is an error that names it.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemmate_lib import timestamps
from gemmate_lib.config import GemmateError
from gemmate_lib.serve.answers import Ask
from gemmate_lib.serve.limits import Refused

# What may be given as long as it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "logprobs": (None, False), "echo": (None, False),
    "suffix": (None, ""), "logit_bias": (None, {}), "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0), "tools": (None, []), "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False), "store": (None, False),
}  # fmt: skip
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
COLDEST = 1e-6  # below it a score over the temperature can be infinite: that is greedy
Name = Annotated[str, Field(max_length=200)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Form):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Wanted(_Form):
    """What both forms of a request share."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timestamp: int | str | None = None

    def prompt_by(self, tokenizer: Any) -> str:
        """The prompt, which the tokenizer may have a template for."""
        raise NotImplementedError

    def ask(self, prompt: str) -> Ask:
        """The question to the engine. Raises: Refused for texts and times that are none."""
        _refuse_half(prompt, "prompt")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 4 or "" in stop:
            raise Refused("stop is up to four texts, none of them empty.", param="stop")
        for text in stop:
            _refuse_half(text, "stop")
        try:
            time = timestamps.parse(self.timestamp, where="timestamp")
        except GemmateError as error:
            raise Refused(str(error), param="timestamp") from None
        temperature = self.temperature or 0.0
        temperature = temperature if temperature >= COLDEST else 0.0
        return Ask(
            self.model, prompt, self.max_tokens, temperature,
            1.0 if self.top_p is None else self.top_p, self.seed,
            None if time == timestamps.MISSING else time, tuple(stop),
        )  # fmt: skip


class CompletionForm(Wanted):
    """The body of a request to /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]

    def prompt_by(self, _: Any) -> str:
        """The prompt as it is."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class Part(_Form):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class Message(_Form):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: None = None

    def plain(self) -> dict[str, str]:
        """As a chat template reads it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatForm(Wanted):
    """The body of a request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def prompt_by(self, tokenizer: Any) -> str:
        """The messages by the tokenizer's chat template, up to where the model is to speak.

        Without a template they are joined by empty lines, roles left out.
        Raises: Refused where the template does not take them.
        """
        from jinja2 import TemplateError

        turns = [message.plain() for message in self.messages]
        for turn in turns:
            _refuse_half(turn["content"], "messages")
        if not getattr(tokenizer, "chat_template", None):
            return "\n\n".join(turn["content"] for turn in turns)
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise Refused(f"The chat template refuses the messages: {error}", param="messages",
                          code="refused_by_template") from None  # fmt: skip
        return str(text)


def read_form(form: type[Wanted], body: bytes) -> Any:
    """Read a request. Raises: Refused naming what is wrong with it."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = str(error) if not isinstance(error, RecursionError) else "it is nested too deeply"
        raise Refused(f"The body is no JSON: {why}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refused("The body is no JSON object.", code="invalid_json")
    both = found.get("max_tokens"), found.get("max_completion_tokens")
    if None not in both:
        raise Refused("Give max_tokens or max_completion_tokens.", param="max_tokens")
    try:
        read = form.model_validate(_without_neutral(found))
    except ValidationError as error:
        raise _named(error) from None
    longest = getattr(read, "max_completion_tokens", None)
    return read.model_copy(update={"max_tokens": longest}) if longest else read


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _without_neutral(found: Mapping[str, Any]) -> dict[str, Any]:
    left = {}
    for key, value in found.items():
        if key in IGNORED:
            continue
        if key not in NEUTRAL:
            left[key] = value
        elif not any((value == each and type(value) is type(each)) or _same_number(value, each)
                     for each in NEUTRAL[key]):  # fmt: skip
            raise Refused(f"{key} is not supported here. Leave it out.", param=key,
                          code="unsupported_parameter")  # fmt: skip
    return left


def _same_number(value: Any, other: Any) -> bool:
    both = (value, other)
    return all(type(x) in (int, float) for x in both) and value == other


def _named(error: ValidationError) -> Refused:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not re.search(r"[\[(]", str(part)))
    where = where[:100] or "The body"  # a name that is no text is nowhere
    param = str(first["loc"][0])[:100] if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return Refused(f"{where} is not known here. Leave it out.", param=param,
                       code="unknown_parameter")  # fmt: skip
    return Refused(f"{where}: {first['msg']}.", param=param, code="invalid_value")


def _refuse_half(text: str, param: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(f"{param} holds half a character.", param=param) from None
