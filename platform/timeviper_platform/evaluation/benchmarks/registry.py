"""Every benchmark with its reader and its scoring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from timeviper_platform.evaluation.benchmarks.caption_readers import (
    read_mlvu_generation,
    read_tempcompass_captioning,
    read_vdc,
)
from timeviper_platform.evaluation.benchmarks.choice_readers import (
    read_egoschema,
    read_longvideobench,
    read_lvbench,
    read_mlvu,
    read_mlvu_test,
    read_videomme,
    read_videomme_v2,
)
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion
from timeviper_platform.evaluation.benchmarks.short_video_readers import read_mvbench, read_tempcompass
from timeviper_platform.evaluation.benchmarks.synth_reader import (
    read_synth_choices,
    read_synth_grounding,
    read_synth_words,
)
from timeviper_platform.evaluation.benchmarks.time_readers import (
    read_activitynet,
    read_activitynet_dense,
    read_charades_sta,
    read_extremewhen,
    read_qvhighlights,
    read_timelens,
    read_youcook2_dense,
)
from timeviper_platform.evaluation.scoring.letters import LetterRule
from timeviper_platform.evaluation.scoring.spans import SpanRule

BenchmarkName = Literal[
    "videomme",
    "videomme_v2",
    "lvbench",
    "mlvu",
    "mlvu_test",
    "longvideobench",
    "egoschema",
    "mvbench",
    "tempcompass",
    "charades_sta",
    "activitynet",
    "timelens",
    "extremewhen",
    "qvhighlights",
    "vdc",
    "mlvu_generation",
    "tempcompass_captioning",
    "activitynet_dense",
    "youcook2",
    "synth",
    "synth_words",
    "synth_grounding",
]

Headline = Literal["mean", "mean_of_tasks", "groups_of_four"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    title: str
    read: Callable[..., list[BenchmarkQuestion]]
    """(folder, videos=folder of videos, subtitles=whether to show them) to questions."""
    headline: Headline = "mean"
    """Mean over questions, unweighted mean over the breakdown `task`, or VideoMME-v2's scores of groups of four."""
    letter_rule: LetterRule = "lmms_eval"
    """Official rule for letters."""
    span_rule: SpanRule = "lmms_eval_charades"
    """Official rule for intervals."""
    drops_empty: bool = False
    """Whether the official score leaves out empty answers."""
    collapses_equal_rows: bool = False
    """Whether the official score counts rows of equal video, query and interval once."""
    max_new_tokens: int = 128


BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    "videomme": Benchmark(title="Video-MME", read=read_videomme),
    "videomme_v2": Benchmark(
        title="Video-MME-v2",
        read=read_videomme_v2,
        headline="groups_of_four",
        letter_rule="lmms_eval_videomme_v2",
    ),
    "lvbench": Benchmark(title="LVBench", read=read_lvbench),
    "mlvu": Benchmark(title="MLVU dev", read=read_mlvu, headline="mean_of_tasks"),
    "mlvu_test": Benchmark(title="MLVU test", read=read_mlvu_test, headline="mean_of_tasks"),
    "longvideobench": Benchmark(
        title="LongVideoBench val", read=read_longvideobench, letter_rule="lmms_eval_longvideobench"
    ),
    "egoschema": Benchmark(title="EgoSchema-500", read=read_egoschema, letter_rule="lmms_eval_egoschema"),
    "mvbench": Benchmark(
        title="MVBench",
        read=read_mvbench,
        headline="mean_of_tasks",
        letter_rule="lmms_eval_mvbench",
        drops_empty=True,
    ),
    "tempcompass": Benchmark(title="TempCompass", read=read_tempcompass),
    "charades_sta": Benchmark(title="Charades-STA", read=read_charades_sta, collapses_equal_rows=True),
    "activitynet": Benchmark(title="ActivityNet grounding", read=read_activitynet, collapses_equal_rows=True),
    "timelens": Benchmark(
        title="TimeLens-Bench", read=read_timelens, span_rule="lmms_eval_timelens", collapses_equal_rows=True
    ),
    "extremewhen": Benchmark(title="ExtremeWhenBench", read=read_extremewhen, span_rule="lmms_eval_extremewhen"),
    "qvhighlights": Benchmark(title="QVHighlights", read=read_qvhighlights),
    "vdc": Benchmark(title="VDC", read=read_vdc, max_new_tokens=512),
    "mlvu_generation": Benchmark(title="MLVU dev, generation", read=read_mlvu_generation, headline="mean_of_tasks"),
    "tempcompass_captioning": Benchmark(title="TempCompass captioning", read=read_tempcompass_captioning),
    "activitynet_dense": Benchmark(
        title="ActivityNet dense captions", read=read_activitynet_dense, max_new_tokens=1024
    ),
    "youcook2": Benchmark(title="YouCook2 dense captions", read=read_youcook2_dense, max_new_tokens=1024),
    "synth": Benchmark(title="timeviper-synth", read=read_synth_choices, headline="mean_of_tasks", letter_rule="synth"),
    "synth_words": Benchmark(
        title="timeviper-synth in words", read=read_synth_words, headline="mean_of_tasks", letter_rule="synth"
    ),
    "synth_grounding": Benchmark(title="timeviper-synth grounding", read=read_synth_grounding),
}
