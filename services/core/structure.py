"""What an answer must look like."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from services.core.errors import InvalidRequestError

StructureKind = Literal["json_schema", "regex", "grammar"]
# The time and the memory that an expression takes to compile grow with the square of its length: here to some seconds.
MOST_CHARACTERS = 1 << 15


@dataclass(frozen=True, slots=True)
class Structure:
    """A form that the whole answer has, once it is complete.

    Attributes:
        kind: ``grammar`` is Lark where a rule is called ``start``, otherwise GBNF.
        asked_by: the request's field, for error messages.
    """

    kind: StructureKind
    text: str
    asked_by: str = field(default="structure", compare=False)

    def __post_init__(self) -> None:
        """Raises InvalidRequestError."""
        if self.kind not in get_args(StructureKind):
            raise InvalidRequestError(f"{self.asked_by}: {self.kind!r} is none of {', '.join(get_args(StructureKind))}")
        if len(self.text) > MOST_CHARACTERS:
            raise InvalidRequestError(f"{self.asked_by}: at most {MOST_CHARACTERS} characters, got {len(self.text)}")
