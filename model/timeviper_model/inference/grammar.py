"""JSON schemas to allowed next tokens, by llguidance."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

MAX_COMPILED = 64
"""Compiled schemas kept."""
STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Formats as json.dumps does; free white space might never end."""


class Matcher:
    """One answer's state."""

    def __init__(self, matcher: Any, num_tokens: int) -> None:
        self._matcher = matcher
        self.num_tokens = num_tokens
        """Of the tokenizer."""

    @property
    def is_done(self) -> bool:
        """True when the text can only end."""
        return bool(self._matcher.is_stopped())

    def write_mask(self, mask_BW: np.ndarray, row: int) -> None:
        """Sets the bits of allowed tokens, clears the others; `accept` raises errors."""
        mask_BW[row] = 0  # the model may have more ids
        fill_next_token_bitmask(self._matcher, mask_BW[:, : (self.num_tokens + 31) // 32], row)

    def accept(self, token_id: int) -> None:
        """Appends a token; ValueError for a too complex schema."""
        self._matcher.consume_token(token_id)
        if error := self._matcher.get_error():
            raise ValueError(f"the schema cannot be followed: {error}")


class GrammarCompiler:
    """Thread-safe; compiles equal schemas once."""

    def __init__(self, tokenizer: Any, end_token_ids: Collection[int]) -> None:
        self._hf_tokenizer, self._end_ids = tokenizer, sorted(end_token_ids)
        self._tokenizer: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = Lock()

    def matcher(self, schema: str) -> Matcher:
        """New matcher; ValueError for an invalid or unsupported schema."""
        with self._lock:
            compiled = self._compiled.pop(schema, None)
            self._compiled[schema] = compiled = self._compile(schema) if compiled is None else compiled
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), self._tokenizer.vocab_size)

    def _compile(self, schema: str) -> Any:
        if self._tokenizer is None:
            self._tokenizer = from_tokenizer(self._hf_tokenizer, eos_token=self._end_ids)  # a second for 130,000 tokens
        try:
            if not isinstance(json.loads(schema), dict):
                raise ValueError("a schema is an object")
            matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_json_schema(schema, overrides=STYLE))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the JSON schema is not valid: {error}") from None
        if reason := matcher.get_error():
            raise ValueError(f"the JSON schema is not supported: {reason}")
        return matcher


def allowed_tokens(matchers: Sequence[Matcher | None], vocab_size: int) -> Tensor | None:
    """(B, vocab_size) bool, all True without a matcher; None without any."""
    sizes = [matcher.num_tokens for matcher in matchers if matcher is not None]
    if not sizes:
        return None
    mask_BW = allocate_token_bitmask(len(matchers), max(vocab_size, *sizes))
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            matcher.write_mask(mask_BW, row)
    bits_BV = np.unpackbits(mask_BW.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size]
    return torch.from_numpy(bits_BV.astype(np.bool_))
