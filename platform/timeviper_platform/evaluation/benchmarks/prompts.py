"""Questions to prompts, in the paper's form and in each owner's."""

from __future__ import annotations

from typing import Literal, NamedTuple

from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion

PromptStyle = Literal["paper", "owner"]
"""paper   of the TimeViper paper's evaluation
owner   of the benchmark's own script; where there is none, of lmms-eval
"""


class Prompt(NamedTuple):
    text: str
    answer_prefix: str = ""
    """Start of the answer, which the model continues."""
    system: str = ""


PAPER_CHOICE_TAIL = "Please provide your answer by stating the letter followed by the full option."
PAPER_SPAN = "Find when this happens in the video: {text} Answer with 'start to end' seconds."
PAPER_WINDOWS = "Find every time when this happens in the video: {text} Answer with 'start to end' seconds for each."
PAPER_DENSE = "{text} Write 'at start - end seconds, sentence' on a line for each event."

_VIDEOMME = (
    "Select the best answer to the following multiple-choice question based on the video{and_subtitles}. Respond with"
    " only the letter ({letters}) of the correct option.\n{text}\n{options}\nThe best answer is:"
)
_VIDEOMME_V2 = (
    "Question: {text}\n{options}\nSelect the best answer to the following multiple-choice question based on the video."
    " Respond with only the letter ({letters}) of the correct option."
)
_DIRECT = "{text}\n{options}\nAnswer with the option's letter from the given choices directly."
_BEST_OPTION = "Question: {text}\nOptions:\n{round_options}\nOnly give the best option."
_ATTENTION = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of"
    " objects, and the action and pose of persons. Based on your observations, select the best option that accurately"
    " addresses the question."
)
_WATCH = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the best option"
    " that accurately addresses the question."
)
_CHARADES = (
    "Please find the visual event described by a sentence in the video, determining its starting and ending times. The"
    " format should be: 'The event happens in the start time - end time'. For example, The event 'person turn a light"
    " on' happens in the 24.3 - 30.4 seonds. Now I will give you the textual sentence: {text}. Please return its start"
    " time and end time."
)
_TIMELENS = (
    "Please find the visual event described by the sentence '{text}', determining its starting and ending times. The"
    " format should be: 'The event happens in <start time> - <end time> seconds'."
)
_EXTREMEWHEN = (
    "[Video Temporal Grounding]\nYou are watching a {whole_seconds}-second long video.\nPlease find the moment"
    " described by the following question, determining its starting and ending times. The format should be: 'The event"
    " happens in the start time - end time'. For example, The event 'person turn a light on' happens in the 24.3 - 30.4"
    ' seconds. Now I will give you the question: "{text}"\nPlease return its start time and end time.'
)

OWNER_PROMPTS: dict[str, Prompt] = {
    "videomme": Prompt(_VIDEOMME),
    "videomme_v2": Prompt(_VIDEOMME_V2),
    "lvbench": Prompt("{text}\n{round_options}\nAnswer the question with the option letter"),
    "mlvu": Prompt(_BEST_OPTION, "Best Option: (", _WATCH),
    "mlvu_test": Prompt(_BEST_OPTION, "Best Option: (", _WATCH),
    "longvideobench": Prompt(_DIRECT),
    "mvbench": Prompt(_BEST_OPTION, "Best option:(", _ATTENTION),
    "egoschema": Prompt(_DIRECT),
    "charades_sta": Prompt(_CHARADES),
    "activitynet": Prompt(_CHARADES),
    "timelens": Prompt(_TIMELENS),
    "extremewhen": Prompt(_EXTREMEWHEN),
    "synth": Prompt(_DIRECT),
    "synth_grounding": Prompt("{text} Answer with 'start to end' seconds."),
}
"""Templates; other benchmarks have the paper's form."""

_TEMPCOMPASS_TAILS = {
    "multi-choice": "Please directly give the best option:",
    "yes_no": "Please answer yes or no:",
    "caption_matching": "Please directly give the best option:",
}


def build_prompt(
    benchmark: str,
    question: BenchmarkQuestion,
    style: PromptStyle,
    *,
    duration: str,
    num_frames: int,
    subtitles: str = "",
) -> Prompt:
    """Fills the template of `style`.

    Args:
        duration: seconds of the video, as written in its annotations.
        num_frames: frames that the model sees.
        subtitles: lines to show before the question.
    """
    fields = _fields(question, duration, bool(subtitles))
    head = f"This video's subtitles are listed below:\n{subtitles}\n" if subtitles else ""
    if "tempcompass" in question.details:
        tail = _TEMPCOMPASS_TAILS[question.details["tempcompass"]]
        is_yes_no = question.details["tempcompass"] == "yes_no"
        return Prompt(f"{question.text}\n{tail}" if is_yes_no else f"{question.text}\n{fields['options']}\n{tail}")
    if question.details.get("form") == "words":
        return Prompt(f"{head}{question.text} Options: {', '.join(question.options)}.")
    if style == "owner" and benchmark in OWNER_PROMPTS:
        owner = OWNER_PROMPTS[benchmark]
        return owner._replace(text=head + owner.text.format(**fields))
    if question.kind == "choice":
        return Prompt(f"{head}{question.text}\n{fields['options']}\n{PAPER_CHOICE_TAIL}", "Best Option: (")
    if question.kind == "caption":
        return Prompt(question.text)
    length = f"The video lasts for {duration} seconds, and {num_frames} frames are uniformly sampled from it. "
    template = {"span": PAPER_SPAN, "windows": PAPER_WINDOWS, "dense": PAPER_DENSE}[question.kind]
    return Prompt(length + template.format(text=question.text))


def option_lines(question: BenchmarkQuestion) -> tuple[str, ...]:
    """Options as the prompt lists them: 'A. text', 'Sentence A: text' for named options, or texts alone."""
    if "tempcompass" in question.details and question.details["tempcompass"] == "caption_matching":
        return tuple(f"{label}: {text}" for label, text in zip(question.labels, question.options, strict=True))
    if question.labels == question.options or question.details.get("form") == "words":
        return question.options
    return tuple(f"{label}. {text}" for label, text in zip(question.labels, question.options, strict=True))


def _fields(question: BenchmarkQuestion, duration: str, has_subtitles: bool) -> dict[str, str]:
    labels = question.labels
    pairs = list(zip(labels, question.options, strict=True))
    return {
        "text": question.text,
        "options": "\n".join(option_lines(question)),
        "round_options": "\n".join(f"({label}) {option}" for label, option in pairs),
        "letters": f"{', '.join(labels[:-1])}, or {labels[-1]}" if labels else "",
        "and_subtitles": " and the subtitles" if has_subtitles else "",
        "whole_seconds": f"{float(duration):.0f}" if duration else "",
    }
