"""Tags: movable names of versions, each with the history of its moves."""

import getpass
import re
import socket
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemmate_lib.config import GemmateError

PRODUCTION, CANDIDATE = "production", "candidate"
NAME = re.compile(r"[a-z][a-z0-9-]{0,38}[a-z0-9]")
HEX = re.compile(r"[0-9a-f]{4,64}")  # the start of a version's digest: no tag looks like one
Act = Literal["tag", "promote", "rollback"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def check_tag(name: str) -> str:
    """A tag's name. Raises: GemmateError for what is none: it names a file."""
    if not NAME.fullmatch(name) or HEX.fullmatch(name):
        rule = "2 to 40 of a-z, 0-9 and -, begun by a letter, and not like a version's number"
        raise GemmateError(f"{name!r} is no name for a tag. Use {rule}: candidate.")
    return name


def short(digest: str | None) -> str:
    """The start of a version's digest, for people."""
    return digest[:12] if digest else "nothing"


class Move(BaseModel):
    """One move of a tag: who moved it, when (UTC), from where to where, and why.

    evidence: of a promotion, what each metric came to; see `promotion.Evidence`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    act: Act
    to: Digest
    before: Digest | None
    when: str
    who: str
    why: str
    evidence: dict[str, Any] = {}


class Tag(BaseModel):
    """A tag as it is kept: its name, and all its moves, the first one first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    moves: Annotated[tuple[Move, ...], Field(min_length=1)]

    @property
    def version(self) -> str:
        """The digest of the version that it names now."""
        return self.moves[-1].to

    def earlier(self) -> str | None:
        """What a rollback goes to: each further one goes a version further back.

        What was rolled back from is not gone to again, but by name.
        """
        path: list[str] = []
        for move in self.moves:
            if move.act == "rollback":
                path.pop()
            else:
                path.append(move.to)
        return path[-2] if len(path) > 1 else None


def read_tag(name: str, text: str | bytes) -> Tag:
    """A tag from its file. Raises: GemmateError where that is not what was written."""
    try:
        found = Tag.model_validate_json(text)
        found.earlier()  # a history that goes back further than it came
        if found.name != name:
            raise ValueError(f"it is that of {found.name!r}")
    except (ValidationError, ValueError, IndexError) as error:
        why = str(error).splitlines()[0]
        raise GemmateError(f"The file of the tag {name} is damaged: {why}. Put it back.") from None
    return found


def moved(tag: Tag | None, name: str, *, to: str, act: Act, why: str, evidence: Any) -> Tag:
    """The tag after one more move."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    before = tag.version if tag else None
    move = Move(act=act, to=to, before=before, when=now, who=_who(), why=why, evidence=evidence)
    return Tag(name=name, moves=(*(tag.moves if tag else ()), move))


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
