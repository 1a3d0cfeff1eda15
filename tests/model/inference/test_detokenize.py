"""detokenize: deltas always join to the whole decoded text, cut at stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from timeviper_model.inference.detokenize import REPLACEMENT, TextStream


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters beyond ASCII take several."""
    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


TOKENIZER = byte_tokenizer()


def deltas(text: str, *, stop: tuple[str, ...] = (), closing: str = "", closed: bool = True) -> list[str]:
    stream = TextStream(TOKENIZER, stop=stop, closing=closing)
    result = []
    for token_id in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        result.append(stream.push(token_id))
        if stream.stopped:
            return result
    return [*result, stream.finish(closed=closed)]


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab \n\u00e9\u4e2d\U0001f600", max_size=20))
def test_deltas_join_to_the_text_and_never_hold_half_a_character(text: str) -> None:
    found = deltas(text)
    assert "".join(found) == text
    assert not any(REPLACEMENT in part for part in found)


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="abc", max_size=12), st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_complete_stop_string(text: str, stop: list[str]) -> None:
    ends = [text.find(s) + len(s) for s in stop if s in text]
    expected = text
    if ends:
        seen = text[: min(ends)]  # the stream stops at the first token that completes any of them
        expected = seen[: min(seen.find(s) for s in stop if s in seen)]
    assert "".join(deltas(text, stop=tuple(stop))) == expected


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    assert deltas("abXYc", stop=("XYZ",)) == ["a", "b", "", "", "XYc", ""]


def test_closing_text_is_dropped_only_at_the_end() -> None:
    assert "".join(deltas("a\nb\n", closing="\n")) == "a\nb"
    assert "".join(deltas("a\nb\n", closing="\n", closed=False)) == "a\nb\n"


def test_bytes_of_an_incomplete_character_are_returned_at_the_end() -> None:
    stream = TextStream(TOKENIZER)
    first_byte = TOKENIZER("\u00e9", add_special_tokens=False)["input_ids"][0]
    assert stream.push(first_byte) == ""
    assert stream.finish(closed=False) == REPLACEMENT


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty stop string"):
        TextStream(TOKENIZER, stop=("",))
