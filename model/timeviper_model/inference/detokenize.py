"""Token ids, one at a time, to text that is certain: never half a character, never the start of a stop string.

Knows a tokenizer's `decode` and strings; nothing of the model. Text is held back while it could still become part of
a stop string, or of what closes an answer (`\\n` before Nemotron's end token), and is released or dropped after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are not yet a whole UTF-8 character."""


class TextStream:
    """The text of one answer as it grows.

    `push` gives what became certain; `stopped` says that a stop string was completed, whose text (and all after it)
    is left out. `finish` gives the rest.
    """

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
        """The text that is certain once `token_id` follows."""
        self._ids.append(token_id)
        self._held += self._new_text(final=False)
        return self._release()

    def finish(self, *, closed: bool) -> str:
        """What was held back; without the closing text when the model itself ended the answer (`closed`)."""
        self._held += self._new_text(final=True)
        text = self._release()
        rest, self._held = self._held, ""
        if self.stopped:
            return text
        return text + (rest.removesuffix(self._closing) if closed else rest)

    def _new_text(self, *, final: bool) -> str:
        """Decodes from a little before the new ids: a token's text can depend on the one before it."""
        known = self._decode(self._ids[self._first : self._next])
        text = self._decode(self._ids[self._first :])
        if not final and (text.endswith(REPLACEMENT) or len(text) <= len(known)):
            return ""
        self._first, self._next = self._next, len(self._ids)
        return text[len(known) :]

    def _release(self) -> str:
        """Cuts the held text at the first stop string, else before the longest tail that may become one."""
        if self.stopped:
            return ""
        places = [(place, text) for text in self._stop if (place := self._held.find(text)) >= 0]
        if places:
            self.stopped = True
            text, self._held = self._held[: min(places)[0]], ""
            return text
        keep = max(
            [_overlap(self._held, text) for text in self._stop] + [_overlap(self._held, self._closing, whole=True)]
        )
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, target: str, *, whole: bool = False) -> int:
    """Length of the longest tail of `text` that begins `target`; `whole` counts a tail equal to it too."""
    longest = len(target) if whole else len(target) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if text.endswith(target[:n])), 0)
