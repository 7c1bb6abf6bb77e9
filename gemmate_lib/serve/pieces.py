"""Tokens to text while they come: never half a character, and the pieces join to the whole."""

from collections.abc import Sequence
from typing import Any

HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character yet


class Pieces:
    """The text of one answer as it grows.

    A character may be of several tokens, and until the last of them is there it is not known.
    Bytes that stand alone as tokens (SentencePiece's `<0x..>`) are decoded as one run, so they
    wait for the end of theirs. What may be the beginning of a stop text waits as well.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._special = frozenset(tokenizer.all_special_ids)
        self._tokens: list[int] = []
        self._sent = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; `stopped` where a stop text is met."""
        self._tokens.append(token)
        word = self._tokenizer.convert_ids_to_tokens(token)
        if token in self._special or word is None or word.startswith("<0x"):
            return ""
        text = self._decode()
        if not self._stop:
            return "" if text.endswith(HALF) else self._send(text, len(text))
        text = self._cut(text.rstrip(HALF))
        return self._send(text, len(text) if self.stopped else self._safe(text))

    def end(self) -> str:
        """What was held back, after the last token."""
        text = self._cut(self._decode()) if not self.stopped else ""
        return self._send(text, len(text))

    def _decode(self) -> str:
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(self._tokens, **plain))

    def _cut(self, text: str) -> str:
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        return text[: min(ends)] if ends else text

    def _safe(self, text: str) -> int:
        """How much of a text can be no beginning of a stop text."""
        new = len(text) - self._sent  # what was sent before can be the beginning of none
        longest = max(
            (n for stop in self._stop for n in range(1, min(len(stop), new + 1))
             if text.endswith(stop[:n])),
            default=0,
        )  # fmt: skip
        return len(text) - longest

    def _send(self, text: str, until: int) -> str:
        piece, self._sent = text[self._sent : until], max(self._sent, until)
        return piece
