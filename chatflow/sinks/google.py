"""What Google's services that are written to have in common: the check at launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from chatflow.errors import UsageError, one_line

_log = logging.getLogger(__name__)


def check_each(
    destinations: Iterable[str], ask: Callable[[str], None], use: str, local: bool
) -> None:
    """Asks a service at launch about destinations of its kind.

    Args:
      ask: about one of them; raises what Google's clients raise.
      use: what is done with them, e.g. `published to`.
      local: the pipeline runs here; else it may reach what is out of reach from here, and
        only what is not there at all is a mistake.

    Raises:
      UsageError: a destination does not exist, or is out of reach.
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
            # The others would be waited for in vain, too.
            _log.warning("not checked: %s: %s", destination, one_line(error))
            return
