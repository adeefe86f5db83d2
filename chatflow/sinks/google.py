"""Checks destinations in Google's services at launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from chatflow.errors import UsageError, one_line

_log = logging.getLogger(__name__)


def check_each(
    destinations: Iterable[str], ask: Callable[[str], None], use: str, local: bool
) -> None:
    """Asks a service about destinations; raises `UsageError` for a missing or unreachable one.

    Args:
      ask: asks about one destination; raises the errors of Google's clients.
      use: what the pipeline does with destinations, for messages, e.g. `published to`.
      local: whether the pipeline runs here. If not, workers may reach more than this machine, so
        only a missing destination is an error.
    """
    from google.api_core.exceptions import GoogleAPIError, NotFound
    from google.auth.exceptions import GoogleAuthError

    for destination in destinations:
        try:
            ask(destination)
        except (GoogleAPIError, GoogleAuthError) as error:
            if local or isinstance(error, NotFound):
                said = f"{destination} cannot be {use}: {one_line(error)}"
                raise UsageError(said) from None
            # The other destinations would fail in the same way.
            _log.warning("not checked: %s: %s", destination, one_line(error))
            return
