"""What a server bears, and what it says where more is asked."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemmate_lib.config import GemmateError

Count = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """What is refused beyond; each is a number above 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    body_bytes: Count = 262_144
    """The longest body of a request. [bytes]"""
    prompt_tokens: Count = 2048
    """The longest prompt. [tokens]"""
    output_tokens: Count = 512
    """The most that may be asked for. [tokens]"""
    slots: Count = 16
    """Requests that are generated for at the same time. [requests]"""
    queue: Count = 64
    """Requests that may wait for a slot; one more is answered 429. [requests]"""
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """The longest that a request may take, its wait included. [s]"""
    connections: Count = 256
    """Open connections. [connections]"""


def read_limits(overrides: Sequence[str] = ()) -> Limits:
    """The limits with some of them set, each as KEY=VALUE.

    Raises: GemmateError for a key that there is not, or a value that is none.
    """
    pairs = [each.partition("=") for each in overrides]
    try:
        return Limits.model_validate({key.strip(): value for key, _, value in pairs})
    except ValidationError as error:
        first = error.errors()[0]
        names = ", ".join(Limits.model_fields)
        problem = f"--set {first['loc'][0]}: {first['msg']}"
        raise GemmateError(f"{problem}. There are {names}, as in queue=8.") from None


class Refused(GemmateError):
    """A request that gets no answer, with the status that says why."""

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None,
        param: str | None = None, retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after = retry_after
