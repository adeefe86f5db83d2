"""What services that are written to have in common: checks at launch, tries after faults, trust."""

from __future__ import annotations

import logging
import time
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


def wait_to_try_again(
    error: Exception, what: str, pause: float, give_up: float, level: int = logging.WARNING
) -> float:
    """Waits after a fault; gives the next, longer pause.

    Args:
      pause: in seconds.
      give_up: when there are no more tries, of `time.monotonic`.

    Raises:
      Exception: the error itself, when the time is over.
    """
    if time.monotonic() + pause > give_up:
        raise error
    _log.log(level, "%s failed, trying again: %s", what, error)
    time.sleep(pause)
    return min(2 * pause, 30)
