"""Broken encodings and personal data: found, located, and never printed."""

import pytest

from gemmate_lib.patterns import encoding_problems, personal_data, redact


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("café “quoted” — Ünïcode 日本", set()),
        ("L'Âme, SÃO PAULO, À la", set()),
        ("cafÃ©", {"mojibake"}),
        ("donâ€™t", {"mojibake"}),
        ("5Â\xa0km", {"mojibake"}),
        ("lost \ufffd here", {"mojibake"}),
        ("a\x00b", {"control characters"}),
        ("zero\u200bwidth", {"control characters"}),
        ("tab\tand\nline\r\n", set()),
        ("half \ud83d", {"half a character"}),
        ("cafe\u0301", {"not NFC"}),
        ("<br> and &amp;", {"markup"}),
        ("1 < 2 and 3 > 2", set()),
    ],
)
def test_encodings(text, found):
    assert encoding_problems(text) == found


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to jane.doe@example.org.", ["e-mail address"]),
        ("call +44 20 7946 0958 now", ["phone number"]),
        ("call (555) 123-4567 now", ["phone number"]),
        ("card 4111 1111 1111 1111", ["card number"]),
        ("card 4111 1111 1111 1112", []),
        ("0000 0000 0000 0000", []),
        ("DE89 3704 0044 0532 0130 00", ["IBAN"]),
        ("DE89 3704 0044 0532 0130 01", []),
        ("ssn 123-45-6789", ["US social security number"]),
        ("host 8.8.8.8", ["IP address"]),
        ("host 192.168.0.1, 300.1.1.1, version 1.2.3.4.5", []),
        ("in 1914-1918, 3.14159, 2026-11-22 and 10,000", []),
        ("user@host and @name", []),
        ("a@b.org and c@d.org", ["e-mail address", "e-mail address"]),
    ],
)
def test_personal_data(text, kinds):
    assert [each.kind for each in personal_data(text)] == kinds


def test_what_is_found_is_located_and_can_be_put_out():
    text = "Ask jane.doe@example.org, or +44 20 7946 0958."
    first, second = personal_data(text)
    assert text[first.start : first.end] == "jane.doe@example.org"
    assert text[second.start : second.end] == "+44 20 7946 0958"
    assert redact(text) == "Ask [e-mail address], or [phone number]."
