"""Token ids to text that no later token can change.

Holds back what may become part of a character, a stop string or the template's closing text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""Output for incomplete UTF-8 characters."""


class TextStream:
    """Text of one growing answer. Sets `stopped` at the first stop string and drops all that follows."""

    def __init__(self, tokenizer: Any, *, stop: Sequence[str] = (), closing: str = "") -> None:
        if any(not text for text in stop):
            raise ValueError("an empty stop string would end every answer before its first token")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._closing = closing
        self._ids: list[int] = []
        self._first = 0
        self._next = 0
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Returns the text that became certain."""
        self._ids.append(token_id)
        self._held += self._new_text(final=False)
        return self._release()

    def finish(self, *, closed: bool) -> str:
        """Returns the held-back text; `closed` removes the template's closing text."""
        self._held += self._new_text(final=True)
        text = self._release()
        rest, self._held = self._held, ""
        if self.stopped:
            return text
        return text + (rest.removesuffix(self._closing) if closed else rest)

    def _new_text(self, *, final: bool) -> str:
        """Decodes the previous ids too, because they affect a token's text."""
        known = self._decode(self._ids[self._first : self._next])
        text = self._decode(self._ids[self._first :])
        if not final and (text.endswith(REPLACEMENT) or len(text) <= len(known)):
            return ""
        self._first, self._next = self._next, len(self._ids)
        return text[len(known) :]

    def _release(self) -> str:
        if self.stopped:
            return ""
        starts = [start for text in self._stop if (start := self._held.find(text)) >= 0]
        if starts:
            self.stopped = True
            text, self._held = self._held[: min(starts)], ""
            return text
        keep = max(
            [_overlap(self._held, text) for text in self._stop] + [_overlap(self._held, self._closing, whole=True)]
        )
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, target: str, *, whole: bool = False) -> int:
    """Length of the longest suffix of `text` that begins `target`."""
    longest = len(target) if whole else len(target) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if text.endswith(target[:n])), 0)
