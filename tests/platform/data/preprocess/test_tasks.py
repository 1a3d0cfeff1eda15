"""Write tasks: consecutive segments, named by their content."""

from __future__ import annotations

from timeviper_platform.data.plan.segments import Segment
from timeviper_platform.data.preprocess.tasks import cut_tasks


def make_segment(index: int, num_frames: int) -> Segment:
    return Segment(
        segment_id=f"{index:032d}", media_id="m", source_version="v", segment_index=index, num_segments=1, uri="u",
        size=0, etag=None, sha256=None, modality="video", duration_seconds=1.0, source_fps=1.0, width=1, height=1,
        codec="c", joined_parts=1, grid_start_seconds=0.0, first_frame=0, num_frames=num_frames,
    )  # fmt: skip


def test_tasks_keep_the_order_of_segments_lose_none_and_have_reproducible_names() -> None:
    segments = [make_segment(index, 24) for index in range(1000)]
    tasks = list(cut_tasks(segments, frames_per_file=240, num_workers=2))
    assert [segment for task in tasks for segment in task.segments] == segments
    assert {len(task.segments) for task in tasks} == {10}
    assert [task.name for task in tasks] == [task.name for task in cut_tasks(segments, 240, num_workers=1)]
    assert len({task.name for task in tasks}) == 100
    assert tasks[0].num_frames == 240


def test_a_small_input_is_shared_among_the_workers() -> None:
    film = [make_segment(index, 64) for index in range(10)]
    assert [len(task.segments) for task in cut_tasks(film, frames_per_file=4096, num_workers=2)] == [1] * 10
    assert [len(task.segments) for task in cut_tasks(film, frames_per_file=10, num_workers=1)] == [1] * 10
