"""Functions of the task files in this folder, for lmms-eval 0.7.3. Imports nothing of this project.

This folder lies in a benchmark's: `..` has test.parquet and videos/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1]

_NUMBER = r"(\d+(?:\.\d+)?)"
_SPAN = re.compile(rf"{_NUMBER}\s*(?:s|seconds)?\s*(?:to|and|-|–)\s*{_NUMBER}")


def choice_docs(dataset: Any) -> Any:
    return dataset.filter(lambda row: bool(row["options"]))


def grounding_docs(dataset: Any) -> Any:
    return dataset.filter(lambda row: row["task"] == "grounding")


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    return [str(FOLDER / "videos" / doc["video"])]


def choice_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    return "\n".join([doc["question"], *doc["options"]]) + _tail(lmms_eval_specific_kwargs)


def words_text(doc: dict[str, Any]) -> str:
    return f"{doc['question']} Options: {', '.join(option.partition('. ')[2] for option in doc['options'])}."


def grounding_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    return doc["question"] + _tail(lmms_eval_specific_kwargs)


def _tail(options: dict[str, str] | None) -> str:
    return (options or {}).get("post_prompt", "")


def choice_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    letter = find_letter(results[0], doc["options"])
    right = float(letter == doc["answer"])
    return {"accuracy": right, f"accuracy_{doc['task']}": right, "unparsable": float(letter is None)}


def find_letter(answer: str, options: list[str]) -> str | None:
    """The option that the answer repeats, else lmms-eval's letter. Failed requests have none."""
    if answer.startswith("[LMMS_EVAL_"):
        return None
    texts = [option.partition(". ")[2].lower() for option in options]
    if (bare := answer.strip().rstrip(".").lower()) in texts:
        return "ABCDEFGH"[texts.index(bare)]
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

    return extract_mcq_answer(answer, choices=list("ABCDEFGH"[: len(options)])) or None


def grounding_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    found = _SPAN.findall(results[0])
    if not found or results[0].startswith("[LMMS_EVAL_"):
        return {"mIoU": 0.0, "R1@0.5": 0.0, "unparsable": 1.0}
    start, end = map(float, found[-1])
    true_start, true_end = doc["span"]
    overlap = min(end, true_end) - max(start, true_start)
    iou = overlap / (max(end, true_end) - min(start, true_start)) if end > start and overlap > 0 else 0.0
    return {"mIoU": iou, "R1@0.5": float(iou >= 0.5), "unparsable": 0.0}
