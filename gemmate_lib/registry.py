"""A registry of runs: versions that never change, and tags that move from one to another.

It lies in a folder, or wherever fsspec writes. A tag is one small file, tags/<name>.json, with all
its moves: the last one says where it is.

In a folder one process at a time moves a tag. Elsewhere nothing can be locked: a bucket replaces
the file of a tag as a whole, and of two who move it at the same moment the later one wins. A move
from where the tag no longer is is refused, and who reads back another's move than his own is told;
there remains a moment between the two in which a move can be lost.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemmate_lib.config import GemmateError
from gemmate_lib.place import Place
from gemmate_lib.tags import HEX, NAME, Act, Tag, check_tag, moved, read_tag, short
from gemmate_lib.versions import Version, Versions


class Registry:
    """The versions and tags in a folder or at an fsspec URL.

    Raises: GemmateError for an address that no installed package reads.
    """

    def __init__(self, url: str | Path) -> None:
        self.place = Place(url)
        self.versions = Versions(self.place)

    def tags(self) -> dict[str, Tag]:
        """All tags by name."""
        names = [n.removesuffix(".json") for n in self.place.names("tags") if n.endswith(".json")]
        found = {name: self.tag(name) for name in names if _is_tag(name)}
        return {name: tag for name, tag in found.items() if tag}

    def tag(self, name: str) -> Tag | None:
        """A tag with its moves; None where there is none.

        Raises: GemmateError for a name that could be none, or a damaged file.
        """
        text = self.place.read("tags", f"{check_tag(name)}.json")
        return None if text is None else read_tag(name, text)

    def find(self, name: str) -> Version:
        """A version by a tag, its digest, or the first four or more digits of that.

        Raises: GemmateError where there is none, or more than one.
        """
        if HEX.fullmatch(name):
            found = [each for each in self.versions.names() if each.startswith(name)]
            if len(found) == 1:
                return self.versions.read(found[0])
            said = f"{len(found)} versions begin" if found else "No version begins"
            raise GemmateError(f"{said} with {name}. See: gemmate registry list")
        if not NAME.fullmatch(name):
            raise GemmateError(f"{name!r} names no version. Give a tag, or 4 digits of a version "
                               "or more. See: gemmate registry list")  # fmt: skip
        if (tag := self.tag(name)) is None:
            there = ", ".join(self.tags()) or "none"
            raise GemmateError(f"There is no tag {name}. The registry has: {there}.")
        return self.versions.read(tag.version)

    def move(
        self,
        name: str,
        to: str,
        *,
        seen: Tag | None,
        why: str = "",
        act: Act = "tag",
        evidence: Mapping[str, Any] | None = None,
    ) -> Tag:
        """Move a tag from where it was seen to a version that verifies; to where it is: no move.

        Raises: GemmateError where it is not there any more, BadVersion for one that is not sound.
        """
        check_tag(name)
        self.versions.verify(to)
        with self.place.alone("tags", f"{name}.json"):
            now = self.tag(name)
            if now != seen:
                where = f"{name} was moved to {short(now.version if now else None)} meanwhile"
                raise GemmateError(f"{where}. Look at it, then repeat what you meant.")
            if now and now.version == to:
                return now
            after = moved(now, name, to=to, act=act, why=why, evidence=dict(evidence or {}))
            self.place.replace(after.model_dump_json(indent=1) + "\n", "tags", f"{name}.json")
            if self.tag(name) != after:
                raise GemmateError(f"Somebody else moved {name} at the same moment. Look at it, "
                                   "then repeat what you meant.")  # fmt: skip
        return after

    def rollback(self, name: str, *, why: str = "") -> Tag:
        """Move a tag to the version before; again: one further back. The move is recorded.

        Raises: GemmateError where there is no tag, or nothing before.
        """
        tag = self.tag(name)
        if tag is None or (to := tag.earlier()) is None:
            raise GemmateError(f"{name} has no version before this one. Tag one: gemmate registry "
                               f"tag VERSION {name}")  # fmt: skip
        return self.move(name, to, seen=tag, why=why, act="rollback")


def _is_tag(name: str) -> bool:
    with contextlib.suppress(GemmateError):
        return bool(check_tag(name))
    return False
