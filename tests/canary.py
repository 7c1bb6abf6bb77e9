"""Look for a token in everything that was written: whole, in parts, and in other writings."""

import base64
import random
import string
from collections.abc import Iterator, Mapping
from pathlib import Path

PART = 8  # characters; so many in a row are no chance


def make_token(seed: int) -> str:
    """A token in the Hub's form that never was one."""
    letters = random.Random(seed).choices(string.ascii_letters + string.digits, k=34)
    return "hf_" + "".join(letters)


def in_an_environment(folder: Path, tokens: tuple[str, str]) -> dict[str, str]:
    """Variables that hold the tokens, and that keep what a program caches inside the folder."""
    (folder / "tmp").mkdir(parents=True)
    caches = {"HOME": folder, "TMPDIR": folder / "tmp", "XDG_CACHE_HOME": folder / ".cache"}
    named = dict(zip(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), tokens, strict=True))
    return {name: str(value) for name, value in caches.items()} | named


def _windows(data: bytes, size: int) -> set[bytes]:
    return {data[i : i + size] for i in range(len(data) - size + 1)}


def writings(token: str) -> dict[str, set[bytes]]:
    """How a token could stand in a file: what to look for, by the name of the writing."""
    plain, found = token.encode(), {}
    found["plain"] = _windows(plain, PART)
    found["UTF-16"] = {part.decode().encode("utf-16-le") for part in found["plain"]}
    found["hexadecimal"] = {part.hex().encode() for part in found["plain"]}
    found["hexadecimal"] |= {part.upper() for part in found["hexadecimal"]}
    # Three bytes are four characters: it matters where among the three the token begins.
    shifted = (base64.b64encode(b"\0" * shift + plain)[4:-4] for shift in range(3))
    found["base64"] = {part for text in shifted for part in _windows(text, PART * 4 // 3)}
    return found


def leaks(folder: Path, tokens: Mapping[str, str]) -> Iterator[str]:
    """Each file in the folder, or its name, that holds a part of a token, and how it is written."""
    wanted = {
        f"{name}, {kind}": parts
        for name, token in tokens.items()
        for kind, parts in writings(token).items()
    }
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        data = name.encode() + b"\0" + file.read_bytes()
        lines = data.replace(b"\\n", b"").translate(None, b"\r\n")  # base64 is written in lines
        for what, parts in wanted.items():
            text = lines if what.endswith("base64") else data
            if any(part in text for part in parts):
                yield f"{name}: {what}"
