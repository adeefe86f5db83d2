"""Sink: the face that each kind of destination has; `write.SCHEMES` lists them."""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from chatflow.options import SinkSettings

if TYPE_CHECKING:
    import apache_beam as beam

Uris = Mapping[str, Sequence[str]]
"""Destinations of one kind, each with the kinds of records that go there."""


class Sink(abc.ABC):
    """A kind of destination, recognised by its URIs. Checks raise `UsageError`.

    Attributes:
      example: what its URIs look like, for messages.
      pattern: how its URIs begin, also those that `check_uri` refuses.
      reviewed: people decide on the drafts there, so failed drafts are written too.
    """

    example: ClassVar[str]
    pattern: ClassVar[re.Pattern[str]]
    reviewed: ClassVar[bool] = False

    def takes(self, uri: str) -> bool:
        """Returns whether a URI is of this kind."""
        return bool(self.pattern.match(uri))

    def check_uri(self, uri: str) -> None:  # noqa: B027
        """Checks the syntax of a URI, and asks no service."""

    def check(self, uris: Uris, settings: SinkSettings, local: bool, share_files: bool) -> None:  # noqa: B027
        """Asks the service, before anything runs, whether records can be written.

        Args:
          local: the pipeline runs here; elsewhere, workers may reach what this machine cannot.
          share_files: workers see the files of this machine.
        """

    def prepare(self, uris: Uris, inputs: Sequence[str], streaming: bool, local: bool) -> int:
        """Removes files of an earlier run, and returns how many; called after all checks.

        Where one of them is among the `inputs` of this run, it refuses.
        """
        return 0

    def shown(self, text: str) -> str:
        """Returns a text without what may be secret in URIs of this kind."""
        return text

    @abc.abstractmethod
    def write(self, uri: str, settings: SinkSettings) -> beam.PTransform:
        """Returns what writes records, and outputs a `DeadLetter` for each refused for good."""
