from __future__ import annotations

from pathlib import Path

import pytest

from reference.benchmark_miniatures import make_miniature
from timeviper_platform.evaluation.benchmarks.annotation_files import AnnotationError
from timeviper_platform.evaluation.benchmarks.prompts import build_prompt, option_lines
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion
from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS, BenchmarkName
from timeviper_platform.evaluation.benchmarks.subtitles import subtitle_text


def _first(name: BenchmarkName, folder: Path, *, subtitles: bool = False) -> BenchmarkQuestion:
    return BENCHMARKS[name].read(make_miniature(name, folder), subtitles=subtitles)[0]


def test_the_papers_choice_prompt_opens_the_answer(tmp_path: Path) -> None:
    prompt = build_prompt("videomme", _first("videomme", tmp_path), "paper", duration="60", num_frames=60)
    assert prompt.text == (
        "What is shown in part 0?\nA. a dog.\nB. a cat.\nC. a bird.\nD. a fish.\n"
        "Please provide your answer by stating the letter followed by the full option."
    )
    assert (prompt.answer_prefix, prompt.system) == ("Best Option: (", "")


def test_the_papers_grounding_prompt_states_length_and_frames(tmp_path: Path) -> None:
    prompt = build_prompt("charades_sta", _first("charades_sta", tmp_path), "paper", duration="30.96", num_frames=32)
    assert prompt.text.startswith(
        "The video lasts for 30.96 seconds, and 32 frames are uniformly sampled from it. Find when"
    )
    assert "person turn a light on." in prompt.text


@pytest.mark.parametrize(
    ("name", "words", "prefix"),
    [
        ("videomme", "Respond with only the letter (A, B, C, or D) of the correct option.", ""),
        ("videomme_v2", "letter (A, B, C, D, E, F, G, or H) of the correct option.", ""),
        ("lvbench", "Which animal?\n(A) a dog\n(B) a cat", ""),
        ("mlvu", "Question: Which animal?\nOptions:\n(A) a dog", "Best Option: ("),
        ("mvbench", "Only give the best option.", "Best option:("),
        ("extremewhen", "4800-second long video", ""),
        ("timelens", "'a man runs', determining", ""),
        ("synth", "Which?\nA. a dog", ""),
        ("synth_words", "Which? Options: a dog, a cat", ""),
        ("synth_grounding", "Which? Answer with 'start to end' seconds.", ""),
        ("tempcompass", "A. jumping\nB. running\nPlease directly give the best option:", ""),
    ],
)
def test_owners_prompts(name: BenchmarkName, words: str, prefix: str, tmp_path: Path) -> None:
    question = _first(name, tmp_path)
    prompt = build_prompt(name, question, "owner", duration=question.duration, num_frames=8)
    assert words in prompt.text
    assert prompt.answer_prefix == prefix
    assert "{" not in prompt.text


def test_named_options_keep_their_names(tmp_path: Path) -> None:
    questions = BENCHMARKS["tempcompass"].read(make_miniature("tempcompass", tmp_path))
    lines = {question.details["tempcompass"]: option_lines(question) for question in questions}
    assert lines["yes_no"] == ("yes", "no")
    assert lines["caption_matching"] == ("Sentence A: it jumps.", "Sentence B: it runs.")


def test_only_subtitles_on_screen_at_a_frame_are_shown(tmp_path: Path) -> None:
    def text(name: BenchmarkName, times: list[float], start: float = 0.0) -> str:
        question = _first(name, tmp_path / name, subtitles=True)
        return subtitle_text(question.subtitles, times, start_seconds=start, duration_seconds=12.5)

    assert text("videomme", [0.0, 1.0, 2.0]) == "first words"
    assert text("videomme", [1.0, 5.5]) == "first words\nlate words"
    assert text("videomme_v2", [1.0, 3.0]) == "word1 word3"
    # LongVideoBench's times begin 10 s into a longer film; a missing end is the video's
    assert text("longvideobench", [0.5], 10.0) == "first"
    assert text("longvideobench", [12.0], 10.0) == "to the end"
    shown = build_prompt(
        "videomme",
        _first("videomme", tmp_path / "videomme"),
        "owner",
        duration="60",
        num_frames=3,
        subtitles="first words",
    )
    assert shown.text.startswith("This video's subtitles are listed below:\nfirst words\nSelect the best answer")
    assert "based on the video and the subtitles" in shown.text


def test_a_video_without_a_subtitle_file_has_none_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert subtitle_text(str(tmp_path / "none.srt"), [0.0], start_seconds=0, duration_seconds=1) == ""
    (tmp_path / "bad.srt").write_text("no times at all")
    with pytest.raises(AnnotationError, match=r"bad\.srt: no '00:00:01,000"):
        subtitle_text(str(tmp_path / "bad.srt"), [0.0], start_seconds=0, duration_seconds=1)
