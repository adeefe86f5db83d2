"""Defines chatflow's errors: one for the person who starts it, one for a single element."""

from __future__ import annotations

import errno
import os

USAGE, FAILED, INTERRUPTED = 2, 1, 130  # exit codes of all commands


class UsageError(Exception):
    """A wrong flag, file or setting; the command line prints it as one line and exits with 2."""


def one_line(error: Exception) -> str:
    """Returns the text of an error as one line of at most 300 characters."""
    text = str(error)
    if len(error.args) > 1 and text == str(error.args):  # one of Google's that wraps another
        text = ": ".join(str(part).rstrip(".") for part in error.args)
    return " ".join(text.split())[:300]


def of_machine(error: OSError) -> str:
    """Returns an error of the operating system as one line: the file, the reason and the remedy."""
    if error.filename is None or error.strerror is None:  # e.g. a broken connection
        return f"{type(error).__name__}: {one_line(error)}"
    remedy = REMEDIES.get(error.errno or 0, "")
    return f"{os.fsdecode(error.filename)}: {error.strerror}{remedy}"


REMEDIES = {
    errno.ENOSPC: "; make room there",
    errno.EMFILE: "; `ulimit -n 4096` lets a process open more files",
}


class ElementError(Exception):
    """An element cannot be handled and becomes a dead letter.

    Attributes:
      reason: a short code for counting, e.g. `not_json`.
      answer: the model's raw answer, if any.
    """

    def __init__(self, reason: str, message: str, answer: str | None = None):
        super().__init__(message)
        self.reason = reason
        self.answer = answer


class BadInputError(ElementError):
    """The input is not a chat that can be analysed."""


class BadAnswerError(ElementError):
    """The model's answer is not what was asked for."""

    def explained(self, circumstances: str) -> BadAnswerError:
        """Returns the same error with more text, e.g. why the model stopped."""
        return BadAnswerError(self.reason, f"{self}{circumstances}", self.answer)


class ModelError(ElementError):
    """The model did not answer."""
