"""Published scores for comparison, in percent: the paper's (arXiv 2511.16595, Tables 1 and 2), and its peers'."""

from __future__ import annotations

from timeviper_platform.evaluation.benchmarks.registry import BenchmarkName

TABLE_1: dict[BenchmarkName, dict[str, float]] = {
    "mvbench": {"TimeViper": 57.2, "TimeViper + TransV": 56.2, "Qwen2.5-7B, same recipe": 57.6},
    "longvideobench": {"TimeViper": 54.1, "TimeViper + TransV": 52.0, "Qwen2.5-7B, same recipe": 55.4},
    "mlvu": {"TimeViper": 65.6, "TimeViper + TransV": 63.1, "Qwen2.5-7B, same recipe": 64.9},
    "videomme": {"TimeViper": 58.8, "TimeViper + TransV": 56.9, "Qwen2.5-7B, same recipe": 56.6},
    "lvbench": {"TimeViper": 35.5, "TimeViper + TransV": 35.6, "Qwen2.5-7B, same recipe": 36.6},
    "charades_sta": {"TimeViper": 40.5, "TimeViper + TransV": 37.9, "Qwen2.5-7B, same recipe": 40.8},
    "vdc": {"TimeViper": 39.7, "TimeViper + TransV": 38.7, "Qwen2.5-7B, same recipe": 42.0},
}
"""Charades-STA is mIoU. The paper's text also gives 56.2 and its Table 2 gives 56.6 for VideoMME with TransV."""

TABLE_2: dict[str, dict[BenchmarkName, float]] = {
    "no reduction": {"videomme": 58.8, "vdc": 39.7, "charades_sta": 40.5},
    "token dropping, uniform at 7": {"videomme": 57.3, "vdc": 39.0, "charades_sta": 26.1},
    "TransV, uniform at 7": {"videomme": 56.7, "vdc": 38.9, "charades_sta": 38.1},
    "TransV, uniform at 7 and at 39": {"videomme": 56.2, "vdc": 39.1, "charades_sta": 37.9},
    "TransV, uniform at 7, attention at 39": {"videomme": 56.6, "vdc": 39.0, "charades_sta": 37.9},
}
"""Half of the tokens dropped at block 7, 90 % at block 39."""

PEERS: dict[BenchmarkName, dict[str, float]] = {
    "mvbench": {"VideoChat-Flash-Qwen2-7B@448": 74.0, "InternVL2.5-8B": 72.0, "Qwen2-VL-7B": 67.0},
    "longvideobench": {
        "VideoChat-Flash-Qwen2-7B@448": 64.7,
        "InternVL2.5-8B": 60.0,
        "LLaVA-Video-7B": 58.2,
        "NVILA-7B": 57.7,
        "Qwen2-VL-7B": 55.6,
    },
    "mlvu": {
        "VideoChat-Flash-Qwen2-7B@448": 74.7,
        "LLaVA-Video-7B": 70.8,
        "NVILA-7B": 70.1,
        "InternVL2.5-8B": 68.9,
    },
    "videomme": {
        "VideoChat-Flash-Qwen2-7B@448": 65.3,
        "InternVL2.5-8B": 64.2,
        "NVILA-7B": 64.2,
        "LLaVA-Video-7B": 63.3,
        "Qwen2-VL-7B": 63.3,
    },
    "lvbench": {"VideoChat-Flash-Qwen2-7B@448": 48.2},
}
"""Models of the same size with other training data, each with its own number of frames; VideoMME without subtitles.
From the model cards OpenGVLab/VideoChat-Flash-Qwen2-7B_res448, OpenGVLab/InternVL2_5-4B (InternVL2.5, Qwen2-VL) and
ruili0/LLaVA-Video-7B-Qwen2-TPO (LLaVA-Video, NVILA)."""

OTHERS: dict[BenchmarkName, dict[str, float]] = {
    "timelens": {"Qwen2.5-VL-7B, Charades split": 39.3},
    "extremewhen": {"Qwen3.5-9B, 768 frames": 4.7},
}
"""mIoU, from the benchmarks' own publications."""


def published_scores(benchmark: BenchmarkName) -> dict[str, float]:
    """Returns scores by model: the paper's, its peers', then its ablation's; {} if none is known."""
    table_2 = {f"Table 2: {row}": scores[benchmark] for row, scores in TABLE_2.items() if benchmark in scores}
    return TABLE_1.get(benchmark, {}) | PEERS.get(benchmark, {}) | OTHERS.get(benchmark, {}) | table_2
