"""What should not be in a text: broken encodings, control characters, personal data."""

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

# What UTF-8 looks like when it was read as Windows-1252 or Latin-1: "Ã©", "â€™", "Â ".
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf]|\u00e2(\u20ac|\u0080)[\\W\u0080-\u024f]|\ufffd"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKUP = re.compile(r"</?[A-Za-z][^<>\n]*>|&(#\d+|#x[\da-f]+|amp|lt|gt|quot|nbsp);", re.IGNORECASE)


def encoding_problems(text: str) -> set[str]:
    """Name what is wrong with a text's characters."""
    found = {name for name, pattern in ENCODINGS.items() if pattern.search(text)}
    return found | ({"not NFC"} if not unicodedata.is_normalized("NFC", text) else set())


ENCODINGS = {
    "mojibake": _MOJIBAKE,
    "control characters": _CONTROL,
    "half a character": _SURROGATE,
    "markup": _MARKUP,
}


class Personal(NamedTuple):
    """Where a text seems to hold personal data: what kind, and the characters; never the text."""

    kind: str
    start: int
    end: int


def _card(text: str) -> bool:
    """Luhn's check of a card number. ISO/IEC 7812-1."""
    digits = [int(c) for c in text if c.isdigit()][::-1]
    doubled = (d if i % 2 == 0 else 2 * d - 9 * (d > 4) for i, d in enumerate(digits))
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _iban(text: str) -> bool:
    """The check of ISO 13616: the number moved around is 1 modulo 97."""
    plain = re.sub(r"\s", "", text).upper()
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _address(text: str) -> bool:
    """Four numbers of an IPv4 address that is somebody's: neither private nor for examples."""
    import ipaddress

    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _phone(text: str) -> bool:
    return 9 <= sum(c.isdigit() for c in text) <= 15


# In this order; a later kind takes no character that an earlier one has.
PERSONAL: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "e-mail address": (re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+"), lambda _: True),
    "IBAN": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){2,7}(?: ?[A-Z\d]{1,3})?\b"), _iban),
    "card number": (re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])"), _card),
    "US social security number": (
        re.compile(r"\b(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}\b"),
        lambda _: True,
    ),
    "IP address": (re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])"), _address),
    "phone number": (
        re.compile(
            r"(?<![\w.])(?:\+\d{1,3}[ .-]?)(?:\(?\d{1,4}\)?[ .-]?){2,5}\d\b"
            r"|(?<![\w.])\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}\b"
        ),
        _phone,
    ),
}


def personal_data(text: str) -> list[Personal]:
    """Find what looks like personal data, in the order of the text; a guess, not a verdict."""
    found: list[Personal] = []
    for kind, (pattern, holds) in PERSONAL.items():
        for match in pattern.finditer(text):
            start, end = match.span()
            free = all(end <= each.start or start >= each.end for each in found)
            if free and holds(match.group()):
                found.append(Personal(kind, start, end))
    return sorted(found, key=lambda each: each.start)


def redact(text: str) -> str:
    """Put the kind for each place that looks like personal data: "[e-mail address]"."""
    for kind, start, end in reversed(personal_data(text)):
        text = f"{text[:start]}[{kind}]{text[end:]}"
    return text
