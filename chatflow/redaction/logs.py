"""Keeps personal data out of the log lines of a process."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any

_changing = threading.Lock()
_before: Callable[..., logging.LogRecord] | None = None
_users = 0


def redact_logs(redact: Callable[[str], str]) -> None:
    """From now on, passes each log line, with its traceback, through `redact`."""
    global _before, _users
    with _changing:
        _users += 1
        if _before is not None:
            return
        before = _before = logging.getLogRecordFactory()

        def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = before(*args, **kwargs)
            try:
                said = record.getMessage()
                if record.exc_info and record.exc_info[0] is not None:
                    said += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
                    record.exc_info = None
                if (hidden := redact(said)) != record.msg:
                    record.msg, record.args = hidden, ()
            except Exception as error:
                record.msg, record.args = f"a log line that cannot be redacted: {type(error)}", ()
            return record

        logging.setLogRecordFactory(make)


def stop_redacting() -> None:
    """Ends what one call of `redact_logs` began."""
    global _before, _users
    with _changing:
        _users -= 1
        if not _users and _before is not None:
            logging.setLogRecordFactory(_before)
            _before = None
