"""Defines the base class of destinations; `write.SCHEMES` lists all kinds."""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from chatflow.options import SinkSettings

if TYPE_CHECKING:
    import apache_beam as beam

Uris = Mapping[str, Sequence[str]]
"""Destinations of one kind, each with the kinds of records to write there."""


class Sink(abc.ABC):
    """A kind of destination, recognised by its URIs. Checks raise `UsageError`.

    Attributes:
      example: the form of its URIs, for messages.
      pattern: how its URIs begin, including those that `check_uri` refuses.
      reviewed: whether people decide on its drafts, so that failed drafts are written too.
    """

    example: ClassVar[str]
    pattern: ClassVar[re.Pattern[str]]
    reviewed: ClassVar[bool] = False

    def takes(self, uri: str) -> bool:
        """Returns whether a URI is of this kind."""
        return bool(self.pattern.match(uri))

    def check_uri(self, uri: str) -> None:  # noqa: B027
        """Checks the syntax of a URI without asking a service."""

    def check(self, uris: Uris, settings: SinkSettings, local: bool, share_files: bool) -> None:  # noqa: B027
        """Checks with the service, before anything runs, that records can be written.

        If not `local`, workers may reach more than this machine. With `share_files`, they can read
        and write its files.
        """

    def shown(self, text: str) -> str:
        """Returns a text without possible secrets in URIs of this kind."""
        return text

    @abc.abstractmethod
    def write(self, uri: str, settings: SinkSettings) -> beam.PTransform:
        """Returns a transform that writes records and outputs a `DeadLetter` per refused one."""
