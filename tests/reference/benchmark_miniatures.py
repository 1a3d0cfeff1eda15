"""Tiny data sets in the layouts of published benchmarks; all questions, names and times are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.evaluation.benchmarks.registry import BenchmarkName
from timeviper_platform.evaluation.benchmarks.short_video_readers import MVBENCH_TASKS

OPTIONS = ("a dog", "a cat", "a bird", "a fish")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _lettered(text: str = "{letter}. {option}", options: tuple[str, ...] = OPTIONS) -> list[str]:
    return [text.format(letter=letter, option=option) for letter, option in zip("ABCDEFGH", options, strict=False)]


def _videomme(root: Path) -> None:
    rows = [
        {
            "video_id": f"00{video + 1}",
            "duration": ("short", "medium")[video],
            "domain": ("Knowledge", "Multilingual")[video],
            "sub_category": "Animation",
            "url": "",
            "videoID": f"vid{video}",
            "question_id": f"00{video + 1}-{number + 1}",
            "task_type": ("Counting Problem", "OCR Problems", "Object Recognition")[number],
            "question": f"What is shown in part {number}?",
            "options": _lettered("{letter}. {option}."),
            "answer": "ABC"[number],
        }
        for video in range(2)
        for number in range(3)
    ]
    write_parquet(root / "videomme" / "test-00000-of-00001.parquet", rows)
    srt = (
        '1\n00:00:00,500 --> 00:00:01,500\n<font color="white" size=".72c">first words</font>\n\n'
        "2\n00:00:05,000 --> 00:00:06,000\nlate words\n"
    )
    (root / "subtitle").mkdir(exist_ok=True)
    (root / "subtitle" / "vid0.srt").write_text(srt, encoding="utf-8")


def _videomme_v2(root: Path) -> None:
    structures = ("[1, 2, 3, 4]", "[1, [2, 3], 4]", "")
    rows = [
        {
            "video_id": f"00{video}",
            "question_id": f"00{video}-{number}",
            "question": "Which?",
            "options": "\n".join(_lettered(options=tuple(f"thing {n}" for n in range(8)))),
            "answer": "G",
            "group_type": "logic" if structures[video] else "relevance",
            "group_structure": structures[video],
            "level": min(number, 3),
            "second_head": "temporal",
            "third_head": f"head {number}",
        }
        for video in range(3)
        for number in range(1, 5)
    ]
    write_parquet(root / "test.parquet", rows)
    write_lines(
        root / "subtitle" / "000.jsonl",
        [{"text": f"word{n}", "start_time": float(n), "end_time": n + 1.0} for n in range(4)],
    )


def _lvbench(root: Path) -> None:
    def entry(uid: int, answer: str | None, types: list[str]) -> dict[str, Any]:
        lines = "\n".join(_lettered("({letter}) {option}"))
        return {
            "uid": str(uid),
            "question": f"Which animal?\n{lines}",
            "answer": answer,
            "question_type": types,
            "time_reference": "00:15-00:19",
        }

    rows = [
        {
            "key": "keyA",
            "type": "sport",
            "video_info": {"fps": 30},
            "qa": [entry(1, "B", ["entity recognition", "reasoning"]), entry(2, None, ["reasoning"])],
        },
        {"key": "keyB", "type": "live", "video_info": {}, "qa": [entry(3, "D", ["summarization"])]},
    ]
    write_lines(root / "video_info.meta.jsonl", rows)


def _mlvu(root: Path) -> None:
    tasks = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning", "sub_scene", "summary")
    for number, task in enumerate(tasks, start=1):
        rows: list[dict[str, Any]] = [
            {
                "video": f"{task}_1.mp4",
                "duration": 246.5,
                "question": "Which animal?",
                "candidates": list(OPTIONS),
                "answer": "a cat",
                "question_type": task,
            }
        ]
        if task == "sub_scene":
            rows[0] |= {"scoring_points": "a cat; on a roof", "question": "What does the cat do?"}
        if task == "needle":  # as in the data set: equal candidates, and an answer that is not a candidate
            rows.append(rows[0] | {"candidates": ["a dog", "a cat", "a cat", "a fish"]})
            rows.append(rows[0] | {"answer": "a horse"})
        write_json(root / "MLVU" / "json" / f"{number}_{task}.json", rows)


def _mlvu_test(root: Path) -> None:
    options = (*OPTIONS, "a fox", "a hen")
    rows = [
        {
            "video_name": f"test_{task}.mp4",
            "question": "Which?\n" + "\n".join(_lettered("({letter}) {option}", options)),
            "answer": answer,
            "task_type": task,
        }
        for task, answer in (("sportsQA", "F"), ("ego", "A"))
    ]
    write_parquet(root / "test-00000-of-00001.parquet", rows)


def _longvideobench(root: Path) -> None:
    rows = [
        {
            "id": f"v{number}_0",
            "video_id": f"v{number}",
            "video_path": f"v{number}.mp4",
            "subtitle_path": f"v{number}_en.json",
            "question": "Which animal?",
            "candidates": list(OPTIONS[: 2 + number]),
            "correct_choice": 1,
            "duration": 12.5,
            "duration_group": (15, 3600)[number],
            "question_category": "T2E",
            "topic_category": "KS",
            "level": "L1",
            "starting_timestamp_for_subtitles": 10.0,
        }
        for number in range(2)
    ]
    write_json(root / "lvb_val.json", rows)
    write_json(
        root / "subtitles" / "v0_en.json",
        [{"timestamp": [10.0, 11.0], "text": "first"}, {"timestamp": [13.0, None], "text": "to the end"}],
    )
    write_json(root / "subtitles" / "v1_en.json", [{"start": "0:00:10.5", "end": "0:00:12.0", "line": "a line"}])


def _egoschema(root: Path) -> None:
    rows = [
        {"q_uid": uid, "google_drive_id": "", "question": "What did C do?"}
        | {f"option {n}": f"C did thing {n}. Then C left." for n in range(5)}
        for uid in ("aaa", "bbb", "ccc")
    ]
    write_json(root / "questions.json", rows)
    write_json(root / "subset_answers.json", {"aaa": 0, "ccc": 4})


def _mvbench(root: Path) -> None:
    for name, task in MVBENCH_TASKS.items():
        row: dict[str, Any] = {
            "video": f"{name}.mp4",
            "question": "Which?",
            "candidates": list(OPTIONS[:3]),
            "answer": "a cat",
        }
        write_json(root / "json" / f"{name}.json", [row | ({"start": 1.0, "end": 3.0} if task.has_clip else {})])


def _tempcompass(root: Path) -> None:
    choice = {"question": "What happens?\nA. jumping\nB. running", "answer": "B. running"}
    matching = {
        "question": "Which sentence fits?\nSentence A: it jumps.\nSentence B: it runs.",
        "answer": "Sentence B: it runs.",
    }
    write_json(root / "meta_info.json", {"101": {"eval_dim": {"action": {"type": "fine-grained action"}}}})
    write_json(root / "questions" / "multi-choice.json", {"101": {"action": [choice], "speed": [choice]}})
    write_json(root / "questions" / "yes_no.json", {"101": {"action": [{"question": "Does it run?", "answer": "yes"}]}})
    write_json(root / "questions" / "caption_matching.json", {"101": {"action": [matching]}})
    captioning = {"question": "Describe the video.", "mc_question": choice["question"], "mc_answer": choice["answer"]}
    write_json(root / "questions" / "captioning.json", {"101": {"action": [captioning]}})


def _charades_sta(root: Path) -> None:
    write_lines(
        root / "charades_sta_test.txt",
        [
            "3MSZA 24.3 30.4##person turn a light on.",
            "3MSZA 24.3 30.4##person turn a light on.",
            "AAAAA 0.0 12.0##a person sits.",
        ],
    )
    write_lines(root / "Charades_v1_test.csv", ["id,subject,length", "3MSZA,X,30.96", "AAAAA,Y,11.50"])


def _activitynet(root: Path) -> None:
    rows = {
        "v_x": {"duration": 82.7, "timestamps": [[0.8, 19.9], [17.0, 60.0]], "sentences": [" A man sits.", "He runs."]}
    }
    write_json(root / "val_1.json", rows | {"v_y": {"duration": 9, "timestamps": [[1, 2]], "sentences": ["A dog."]}})
    write_json(root / "val_2.json", rows)


def _youcook2(root: Path) -> None:
    video = {
        "duration": 90.0,
        "subset": "validation",
        "annotations": [{"segment": [5, 20], "sentence": "cut it", "id": 0}, {"segment": [30, 50], "sentence": "fry"}],
    }
    database = {"abc": video, "def": video | {"subset": "training"}}
    write_json(root / "youcookii_annotations_trainval.json", {"database": database})


def _timelens(root: Path) -> None:
    for split in ("activitynet", "charades", "qvhighlights"):
        rows = [{"video_path": f"{split}/v.mp4", "query": "a man runs", "span": [[3.0, 7.5]], "duration": 20.0}]
        write_parquet(root / f"{split}-00000-of-00001.parquet", rows)


def _extremewhen(root: Path) -> None:
    rows = [
        {
            "qid": f"q{number}",
            "video_id": f"v{number}",
            "source_corpus": corpus,
            "question": "When does the dog bark?",
            "correct_interval": [100.0, 130.0],
            "video_duration_s": 4800.5,
        }
        for number, corpus in enumerate(("LVBench", "MLVU"))
    ]
    write_parquet(root / "test.parquet", rows)


def _qvhighlights(root: Path) -> None:
    row = {
        "qid": 8737,
        "query": "A man cooks",
        "duration": 126,
        "vid": "bP5K_660.0_810.0",
        "relevant_windows": [[0, 16], [40, 60]],
        "relevant_clip_ids": [0, 1],
        "saliency_scores": [[4, 1, 1], [3, 2, 2]],
    }
    write_lines(root / "highlight_val_release.jsonl", [row])


def _vdc(root: Path) -> None:
    pairs = [{"question": "What room?", "answer": "kitchen", "category": "location"}]
    for aspect in ("detailed", "camera", "background", "main_object", "short"):
        write_lines(root / "post_eval" / f"{aspect}.jsonl", [{"uuid1": pairs}, {"uuid2": pairs * 2}])


def _synth(root: Path) -> None:
    row: dict[str, Any] = {"video": "v.mp4", "seconds": 30, "question": "Which?", "options": _lettered(), "answer": "B"}
    rows = [row | {"question_id": f"v/{task}", "task": task, "span": None} for task in ("choice", "order", "count")]
    when = {
        "question_id": "v/g",
        "task": "grounding",
        "options": [],
        "answer": "1 to 2",
        "span": [1.0, 2.0],
    }
    write_parquet(root / "test.parquet", [*rows, row | when, row | when | {"question_id": "v/c", "task": "caption"}])


MINIATURES: dict[BenchmarkName, tuple[Callable[[Path], None], int]] = {
    "videomme": (_videomme, 6),
    "videomme_v2": (_videomme_v2, 12),
    "lvbench": (_lvbench, 2),
    "mlvu": (_mlvu, 9),
    "mlvu_test": (_mlvu_test, 2),
    "longvideobench": (_longvideobench, 2),
    "egoschema": (_egoschema, 2),
    "mvbench": (_mvbench, 20),
    "tempcompass": (_tempcompass, 4),
    "charades_sta": (_charades_sta, 3),
    "activitynet": (_activitynet, 2),
    "timelens": (_timelens, 3),
    "extremewhen": (_extremewhen, 2),
    "qvhighlights": (_qvhighlights, 1),
    "vdc": (_vdc, 10),
    "mlvu_generation": (_mlvu, 2),
    "tempcompass_captioning": (_tempcompass, 1),
    "activitynet_dense": (_activitynet, 2),
    "youcook2": (_youcook2, 1),
    "synth": (_synth, 3),
    "synth_words": (_synth, 3),
    "synth_grounding": (_synth, 1),
}
"""What writes each miniature, and its number of questions."""


def make_miniature(name: BenchmarkName, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    MINIATURES[name][0](folder)
    return str(folder)
