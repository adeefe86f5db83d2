"""Keeps personal data out of the log lines of a process."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any

_changing = threading.Lock()
_before: Callable[..., logging.LogRecord] | None = None


def redact_logs(redact: Callable[[str], str]) -> None:
    """From now on, passes each log line of this process, with its traceback, through `redact`."""
    global _before
    with _changing:
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
                record.exc_info = None
                record.msg = f"a log line was withheld, because redacting it failed: {type(error)}"
                record.args = ()
            return record

        logging.setLogRecordFactory(make)


def stop_redacting() -> None:
    """Ends what `redact_logs` began; for tests, and for programs that run other pipelines later."""
    global _before
    with _changing:
        if _before is not None:
            logging.setLogRecordFactory(_before)
            _before = None
