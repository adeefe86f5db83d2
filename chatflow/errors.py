"""The errors of chatflow: one for the person who starts it, one for an element."""

from __future__ import annotations

USAGE, FAILED, INTERRUPTED = 2, 1, 130  # exit codes of all commands


class UsageError(Exception):
    """A wrong flag, file or setting; the command line shows it as one line, exit code 2."""


def one_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    return " ".join(str(error).split())[:300]


class ElementError(Exception):
    """An element cannot be handled; it becomes a dead letter.

    Attributes:
      reason: a short code for counting, e.g. `not_json`.
      answer: the model's raw answer, where there is one.
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
        """The same with more to say, e.g. why the model ended."""
        return BadAnswerError(self.reason, f"{self}{circumstances}", self.answer)


class ModelError(ElementError):
    """The model gave no answer."""
