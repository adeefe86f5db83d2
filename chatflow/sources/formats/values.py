"""Reads JSON values one after another from a text that may not fit into memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_BETWEEN = re.compile(r"[\s,]*")
_OUTSIDE, _IN_STRING = re.compile(r'["\[\]{}]'), re.compile(r'\\.|"', re.DOTALL)
_LONGEST_WORD = 16  # characters of a literal or an escape, which may be cut at the end of a piece

_LONGEST_EXPONENT = 3  # characters such as "e+" that belong to a number only if a digit follows


class Element(NamedTuple):
    """A value and its length in characters; None if it is too long, or nested too deeply."""

    value: Any
    length: int
    is_deep: bool = False


def elements(pieces: Iterator[str], most: int) -> Iterator[Element]:
    """Yields the elements of arrays, and the values outside of arrays.

    Args:
      pieces: the text.
      most: a value with more characters is not kept in memory.

    Raises `ValueError` where the text is not JSON, and `EOFError` where it ends too early.
    """
    text, in_array = _Text(pieces, most), False
    while mark := text.mark():
        if not in_array and mark == "[":
            in_array = text.take("[")
        elif in_array and mark == "]":
            in_array = not text.take("]")
        else:
            yield text.value()
    if in_array:
        raise EOFError("the array has no end")


def pairs(pieces: Iterator[str], most: int) -> Iterator[tuple[str, Any]]:
    """Yields the names and values of an object, except too long ones; raises as `elements` does."""
    text = _Text(pieces, most)
    text.take("{")
    while text.mark() != "}":
        name = text.value().value
        text.take(":")
        value, length, is_deep = text.value()
        if length <= most and not is_deep:
            yield str(name), value


class _Text:
    """A text; the part from `_at` on is still to be read."""

    def __init__(self, pieces: Iterator[str], most: int):
        self._pieces, self._most = pieces, most
        self._text, self._at = "", 0
        self._decoder = json.JSONDecoder()

    def mark(self) -> str:
        """Returns the next character that is neither space nor comma; "" at the end."""
        while True:
            self._at = _BETWEEN.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, mark: str) -> bool:
        if (found := self.mark()) != mark:
            if not found:
                raise EOFError(f"{mark!r} is missing")
            raise json.JSONDecodeError(f"Expecting {mark!r}", self._text, self._at)
        self._at += 1
        return True

    def value(self) -> Element:
        self.mark()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                near_end = error.pos > len(self._text) - _LONGEST_WORD
                if not near_end and not error.msg.startswith("Unterminated"):
                    raise
                is_long = len(self._text) - self._at > self._most
                if is_long and self._text[self._at] in '{["':
                    return Element(None, self._skip())
                if not self._more():
                    raise EOFError(str(error)) from None
                continue
            except RecursionError:
                return Element(None, self._skip(), is_deep=True)
            if end > len(self._text) - _LONGEST_EXPONENT and self._more():
                continue  # a number may continue in the next piece
            length = end - self._at
            self._at = end
            return Element(value if length <= self._most else None, length)

    def _skip(self) -> int:
        """Skips an object, array or string, and returns its length."""
        length, depth, in_string = 0, 0, False
        while True:
            found = (_IN_STRING if in_string else _OUTSIDE).search(self._text, self._at)
            if found is None:
                last = max(len(self._text) - 1, self._at)  # it may begin an escape
                length += last - self._at
                self._at = last
                if not self._more():
                    raise EOFError("a value has no end")
                continue
            length += found.end() - self._at
            self._at = found.end()
            if found[0] == '"':
                in_string = not in_string
            elif not in_string:
                depth += 1 if found[0] in "[{" else -1
            if not in_string and depth <= 0:
                return length

    def _more(self) -> bool:
        """Reads at least as much as is still waiting; returns whether there was more."""
        found = [self._text[self._at :]]
        wanted = len(found[0])
        while piece := next(self._pieces, ""):
            found.append(piece)
            wanted -= len(piece)
            if wanted <= 0:
                break
        if len(found) == 1:
            return False
        self._text, self._at = "".join(found), 0
        return True
