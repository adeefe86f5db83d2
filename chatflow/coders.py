"""Writes elements as JSON where they leave a worker, so that another version can read them.

A runner keeps elements between two steps as bytes: where it shuffles, and in the state of a stream.
When a running stream is updated, the new version reads what the old one wrote. Pickles, which Beam
uses for types that it does not know, break when a class moves or changes; JSON does not, as long as
new fields have defaults. They also take more time.
"""

from __future__ import annotations

import functools
import pickle
from typing import Any, ClassVar

import apache_beam as beam
import pydantic
import pydantic_core


class JsonCoder(beam.coders.Coder):
    """Writes elements of a type as JSON, behind a byte that names the format.

    What JSON cannot hold is pickled, e.g. half an emoji, so that no element fails its bundle.

    Attributes:
      FORMAT, PICKLE: the byte; a format that cannot read the one before it takes another.
      kind: a record, dataclass or `NamedTuple`, as pydantic reads and writes it.
    """

    FORMAT: ClassVar[bytes] = b"1"
    PICKLE: ClassVar[bytes] = b"0"

    def __init__(self, kind: Any):
        self.kind = kind

    @classmethod
    def from_type_hint(cls, kind: Any, registry: Any) -> JsonCoder:
        return cls(kind)

    def encode(self, element: Any) -> bytes:
        try:
            return self.FORMAT + self.to_json(element)
        except pydantic_core.PydanticSerializationError:
            return self.PICKLE + pickle.dumps(element)

    def decode(self, encoded: bytes) -> Any:
        """Returns an element; raises `ValueError` for an unknown format."""
        name, content = encoded[:1], encoded[1:]
        if name == self.FORMAT:
            return self.of_json(content)
        if name == self.PICKLE:
            return pickle.loads(content)
        raise ValueError(
            f"{name!r} is not a format of {self.kind.__name__} that this version of chatflow "
            "reads; drain the stream with the version that wrote it"
        )

    def to_json(self, element: Any) -> bytes:
        return _adapter(self.kind).dump_json(element, exclude_defaults=True, warnings="error")

    def of_json(self, content: bytes) -> Any:
        return _adapter(self.kind).validate_json(content)

    def is_deterministic(self) -> bool:
        return False

    def to_type_hint(self) -> Any:
        return self.kind

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.kind))


LOSSLESS = pydantic.ConfigDict(
    ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants"
)
"""Bytes need not be UTF-8, and logarithms of probabilities may be infinite."""


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind, config=LOSSLESS if issubclass(kind, tuple) else None)


def register(*kinds: Any, coder: type[JsonCoder] = JsonCoder) -> None:
    """Makes Beam write elements of these types with a coder."""
    for kind in kinds:
        beam.coders.registry.register_coder(kind, coder)
