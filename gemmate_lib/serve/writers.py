"""Answers as OpenAI writes them: at once, or in pieces."""

import secrets
import time
from typing import Any

from gemmate_lib.serve.answers import Answer
from gemmate_lib.serve.forms import Wanted


class Writer:
    """An answer in the form of /v1/completions."""

    prefix, kind, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, wanted: Wanted, answer: Answer) -> None:
        self._answer, self._model = answer, wanted.model
        options = wanted.stream_options
        self._usage = bool(options and options.include_usage)
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time())}

    def whole(self, text: str) -> dict[str, Any]:
        """All at once."""
        return self._object(self.kind, [self.choice(text, self._answer.finish)], self.usage())

    def begin(self) -> list[dict[str, Any]]:
        """What comes before the first piece."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        """One piece of a stream."""
        return self._chunk([self.delta(text)])

    def end(self) -> list[dict[str, Any]]:
        """What comes after the last piece."""
        last = [self._chunk([self.delta(None, self._answer.finish)])]
        return last + ([self._object(self.chunk, [], self.usage())] if self._usage else [])

    def usage(self) -> dict[str, int]:
        """How many tokens there were."""
        read, made = self._answer.prompt_tokens, self._answer.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def choice(self, text: str, finish: str | None) -> dict[str, Any]:
        """The one choice of an answer."""
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    def delta(self, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """The one choice of a piece."""
        return self.choice(text or "", finish)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        made = self._object(self.chunk, choices, None)
        return made if self._usage else {k: v for k, v in made.items() if k != "usage"}

    def _object(self, kind: str, choices: Any, usage: Any) -> dict[str, Any]:
        return self._head | {"object": kind, "model": self._model, "choices": choices,
                             "usage": usage}  # fmt: skip


class ChatWriter(Writer):
    """An answer in the form of /v1/chat/completions."""

    prefix, kind, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self) -> list[dict[str, Any]]:
        """Say who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "finish_reason": None}])]

    def choice(self, text: str, finish: str | None) -> dict[str, Any]:
        """The one choice of an answer."""
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}

    def delta(self, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """The one choice of a piece."""
        found = {} if text is None else {"content": text}
        return {"index": 0, "delta": found, "logprobs": None, "finish_reason": finish}
