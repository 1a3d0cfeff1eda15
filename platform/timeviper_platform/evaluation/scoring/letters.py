"""Letters of multiple-choice answers, by our rule and by those of public scorers.

Public scorers find different letters in the same answer, so each rule is named with every score.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Literal

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

LetterRule = Literal[
    "strict",
    "lmms_eval",
    "lmms_eval_mvbench",
    "lmms_eval_videomme_v2",
    "lmms_eval_longvideobench",
    "lmms_eval_egoschema",
    "vlmevalkit",
    "synth",
]
"""strict            no letter in an ambiguous or unparsable answer
lmms_eval         `extract_mcq_answer` of lmms-eval 0.7.3, for VideoMME, LVBench and MLVU
lmms_eval_NAME    the functions of lmms-eval 0.7.3 for one benchmark
vlmevalkit        VLMEvalKit's for VideoMME and LongVideoBench, as in VideoMME's own script
synth             the task files of timeviper-synth: an option's text, else lmms_eval
"""


def find_letter(rule: LetterRule, answer: str, options: Sequence[str]) -> str | None:
    """Returns the letter that `answer` chooses, or None.

    Args:
        options: in the order of their letters, with or without 'A. '. Public rules also return letters beyond them.
    """
    return _RULES[rule](answer, options)


def bare_option(option: str) -> str:
    """'A. text', '(A) text' and 'A) text' become 'text'."""
    return re.sub(r"^\s*(?:\([A-Z]\)|[A-Z][.):])\s*", "", option)


def _strict(answer: str, options: Sequence[str]) -> str | None:
    """The last 'answer is X' or 'option: X', else one 'option X', else a leading or last lone letter, else a text."""
    letters = LETTERS[: len(options)]
    text = answer.replace("*", "").strip()
    if not letters or not text:
        return None
    either_case = f"[{letters}{letters.lower()}]"
    # a lower-case letter before a word is an article
    letter = rf"[(\[\"']?(?P<letter>[{letters}](?![A-Za-z0-9'])|{either_case}(?=[)\].,:;!\"']|\s*$))"
    explicit = (
        rf"(?i:\b(?:(?:answer|option|choice)(?:\s+(?:is|would\s+be)\b|\s*[:=])|answer)\s*:?\s*(?:option\s+)?){letter}"
    )
    if stated := list(re.finditer(explicit, text)):
        return _one_of(stated[-1], text, options)
    if named := list(re.finditer(rf"(?i:\b(?:option|choice)\s+){letter}", text)):
        return _one_of(named[0], text, options) if len({match["letter"] for match in named}) == 1 else None
    leading = re.match(rf"[(\[\"']?(?P<letter>{either_case})(?:[)\].:,]|\s*$|\s*\n|\s+[-–—]\s)", text)
    lone = re.fullmatch(rf"[(\[\"']?(?P<letter>{either_case})[)\].,:;!\"']*", text.splitlines()[-1].strip())
    if leading is None and lone is None:
        return _by_text(text, options)
    found = {match["letter"].upper() for match in (leading, lone) if match is not None}
    if len(found) > 1:
        return None
    return found.pop() if leading is None else _one_of(leading, text, options)


def _one_of(match: re.Match[str], text: str, options: Sequence[str]) -> str | None:
    """The letter of `match`, None in 'A or B'; in 'A dog', the option with this text, if there is one."""
    letters, rest = LETTERS[: len(options)], text[match.end("letter") :]
    if re.match(rf"[)\].,\s]*(?:[/,&]|\bor\b|\band\b)\s*[(\[]?[{letters}](?![A-Za-z'])", rest):
        return None
    if re.match(r"\s+[a-z]", rest):
        named = _plain(text[match.start("letter") :])
        starts = [index for index, option in enumerate(options) if named.startswith(_plain(bare_option(option)))]
        if len(starts) == 1:
            return LETTERS[starts[0]]
    return match["letter"].upper()


def _by_text(answer: str, options: Sequence[str]) -> str | None:
    stated = re.split(r"(?i)\b(?:answer|option|choice)(?:\s+is\b|\s*:)", answer)[-1]
    texts = {_plain(answer), _plain(stated)}
    found = [n for n, option in enumerate(options) if {_plain(option), _plain(bare_option(option))} & texts]
    return LETTERS[found[0]] if len(found) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


_ANSWER_PHRASES = (
    *(
        f"{start}{best}{noun} is"
        for noun in ("answer", "option", "choice")
        for best in ("", "correct ", "best ")
        for start in ("", "the ")
        if (noun, best) not in (("option", ""), ("choice", "best "))
    ),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
"""The phrases of lmms-eval."""


def _lmms_eval(answer: str, options: Sequence[str], letters: str = "ABCD") -> str | None:
    """The form of the highest rank wins, then the last; letters are found inside words too."""
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    if not answer.strip():
        return None
    bare, text = text.strip(), f" {text} "
    lower = text.lower()
    found: list[tuple[int, int, str]] = []  # rank, position, letter
    for letter in letters:
        forms = ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"), (3, f"{letter})"), (2, f"{letter} "))
        found += [(rank, text.rfind(form), letter) for rank, form in forms if form in text]
        starts = [(lower.find(phrase), len(phrase)) for phrase in _ANSWER_PHRASES]
        places = [text.find(letter, start + length) for start, length in starts if start >= 0]
        found += [(7, place, letter) for place in places if place >= 0]
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and (len(bare) == 1 or not bare[-2].isalpha()):
            found.append((9, len(text) - 1, letter))
    found = found or [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found)[2] if found else None


_MVBENCH_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def _lmms_eval_mvbench(answer: str, options: Sequence[str]) -> str | None:
    """'B. text' at the start, else the first letter A to E between word boundaries, in any case."""
    if match := re.match(r"([A-E])\.\s*(.+)$", answer.strip(), re.IGNORECASE):
        return match[1].upper()
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    stripped = text
    has_number_comma = re.search(r"\d,\d", text) is not None
    for mark in _MVBENCH_MARKS:
        is_at_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if is_at_space or has_number_comma else " ")
    stripped = re.sub(r"\.(?!\d)", "", stripped, count=32)  # the public code passes re.UNICODE as the count
    letter = re.search(r"\b([A-E])\b", stripped, re.IGNORECASE)
    return letter[1].upper() if letter else None


_V2_PREFIXES = (
    "The best answer is|The correct answer is|The answer is|The answer|The best option is|The correct option is"
    r"|Final Answer:|Best answer:|Best option:|Answer:|Option:|\b(?:answer|option)(?:\s+(?:is|would\s+be)|\s*:)"
)


def _lmms_eval_videomme_v2(answer: str, options: Sequence[str]) -> str | None:
    """A letter alone at the end or the start, after 'answer is', or in bold; else the only option whose text occurs."""
    text, bold = answer.strip(), r"(?:\*\*[ \t]*)?([A-H])(?:[ \t]*\*\*)?[ \t]*"
    for match in (
        re.search(rf"(?:^|\n)[ \t]*{bold}[.)]?[ \t]*$", text, re.IGNORECASE),
        re.match(rf"[ \t]*{bold}(?:[.)]|\r?\n|$)", text, re.IGNORECASE),
    ):
        if match:
            return match[1].upper()
    if stated := re.findall(rf"(?:{_V2_PREFIXES})[\s:*]*([A-H])\b", text, re.IGNORECASE):
        return stated[-1].upper()
    in_bold = {letter.upper() for letter in re.findall(r"\*\*\s*([A-H])(?=\s*\*\*|[.)])", text, re.IGNORECASE)}
    if len(in_bold) == 1:
        return in_bold.pop()
    texts = {letter: bare_option(option).strip(". \n") for letter, option in zip(LETTERS, options, strict=False)}
    named = [letter for letter, option in texts.items() if option.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


_VLMEVALKIT_PREFIXES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    "The best option isThe correct option is",  # its list lacks commas
    "Best answer:Best option:",
    *("Answer:", "Option:"),
)
_LONGVIDEOBENCH_PREFIXES = (
    *_VLMEVALKIT_PREFIXES[:4],
    *("The best option is", "The correct option is", "Best answer:", "Best option:"),
)


def _first_capital(answer: str, prefixes: Sequence[str], letters: str) -> str | None:
    """The first of `letters`, even inside a word, after all `prefixes` are cut out."""
    text = answer.strip()
    for prefix in prefixes:
        text = text.replace(prefix, "")
    match = re.search(f"[{letters}]", text)
    return match[0] if match else None


def _vlmevalkit(answer: str, options: Sequence[str]) -> str | None:
    return _first_capital(answer, _VLMEVALKIT_PREFIXES, "ABCD")


def _lmms_eval_longvideobench(answer: str, options: Sequence[str]) -> str | None:
    found = _first_capital(answer, _LONGVIDEOBENCH_PREFIXES, "ABCDE")
    return found or _drawn(answer, options)


def _lmms_eval_egoschema(answer: str, options: Sequence[str]) -> str | None:
    """The first '(A)', 'A ' or 'A.', each by its last occurrence; in longer answers without one, the first text."""
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text, letters = f" {text} ", LETTERS[: len(options)]
    forms = [form.format(letter) for form in ("({})", "{} ", "{}.") for letter in letters]
    found = [(text.rfind(form), order, form.strip("(). ")) for order, form in enumerate(forms) if form in text]
    if not found and len(text.split()) > 5:
        texts = [option.strip().lower() for option in options]
        lower = text.lower()
        found = [(lower.rfind(option), n, letters[n]) for n, option in enumerate(texts) if option in lower]
    return min(found)[2] if found else _drawn(answer, options)


def _drawn(answer: str, options: Sequence[str]) -> str | None:
    """A random letter, as the public code has for unparsable answers; here the same one for the same answer."""
    return random.Random(f"{answer}\n{len(options)}").choice(LETTERS[: len(options)]) if options else None


def _synth(answer: str, options: Sequence[str]) -> str | None:
    bare = answer.strip().rstrip(".").lower()
    texts = [bare_option(option).lower() for option in options]
    if bare in texts:
        return LETTERS[texts.index(bare)]
    return _lmms_eval(answer, options, LETTERS[: len(options)])


_RULES: dict[LetterRule, Callable[[str, Sequence[str]], str | None]] = {
    "strict": _strict,
    "lmms_eval": _lmms_eval,
    "lmms_eval_mvbench": _lmms_eval_mvbench,
    "lmms_eval_videomme_v2": _lmms_eval_videomme_v2,
    "lmms_eval_longvideobench": _lmms_eval_longvideobench,
    "lmms_eval_egoschema": _lmms_eval_egoschema,
    "vlmevalkit": _vlmevalkit,
    "synth": _synth,
}
