"""published: the paper's scores come first, then its peers', and the ablation last."""

from __future__ import annotations

from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS
from timeviper_platform.evaluation.results.published import published_scores


def test_scores_are_percent_of_known_benchmarks_with_the_papers_first() -> None:
    found = {name: published_scores(name) for name in BENCHMARKS}
    assert all(0 < score < 100 for scores in found.values() for score in scores.values())
    names = list(found["videomme"])
    assert names[:2] == ["TimeViper", "TimeViper + TransV"]
    assert "VideoChat-Flash-Qwen2-7B@448" in names[2:]
    assert names[-1].startswith("Table 2")
    assert found["extremewhen"] == {"Qwen3.5-9B, 768 frames": 4.7}
    assert found["egoschema"] == {}
