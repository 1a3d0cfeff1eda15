from __future__ import annotations

from itertools import pairwise

from timeviper_platform.data.synthetic.long_films import FILM_SECONDS, Clip, empty_clips, long_film_samples
from timeviper_platform.data.synthetic.scenes import Scene, draw_scenes

SCENES = list(draw_scenes("train", {"needle": 12, "order": 4, "count": 4}, duration_seconds=24, seed=3))


def shown(scene: Scene, clip: Clip) -> set[str]:
    seconds = range(clip.start_seconds, clip.end_seconds)
    return {str(found.picture) for second in seconds if (found := scene.appearance_at(second))}


def test_empty_clips_are_all_seconds_that_are_not_beside_a_picture() -> None:
    for scene in SCENES:
        clips = list(empty_clips(scene))
        seconds = [second for clip in clips for second in range(clip.start_seconds, clip.end_seconds)]
        assert seconds == [
            second
            for second in range(scene.duration_seconds)
            if not any(a.start_seconds - 1 <= second < a.end_seconds + 1 for a in scene.appearances)
        ]
        assert all(before.end_seconds < after.start_seconds for before, after in pairwise(clips))


def test_a_long_film_shows_the_picture_of_its_answer_alone() -> None:
    scenes = {scene.media_id: scene for scene in SCENES}
    rows = list(long_film_samples(SCENES, 40, seed=(0, 5)))
    lengths, depths = set(), set()
    for row in rows:
        clips = [Clip(m["media_id"], int(m["start_seconds"]), int(m["end_seconds"])) for m in row["media"]]
        assert all(0 <= clip.start_seconds < clip.end_seconds <= 24 for clip in clips)
        pictures = [shown(scenes[clip.media_id], clip) for clip in clips]
        (index,) = [number for number, names in enumerate(pictures) if names]
        question, answer = row["conversation"]
        assert pictures[index] == {answer["text"]}
        assert answer["text"] in question["text"]
        lengths.add(sum(clip.seconds for clip in clips))
        depths.add(sum(clip.seconds for clip in clips[:index]) / sum(clip.seconds for clip in clips))
    assert FILM_SECONDS[0] <= min(lengths) < 60 < 200 < max(lengths) <= FILM_SECONDS[1]
    assert min(depths) < 0.2 < 0.8 < max(depths)
    assert rows == list(long_film_samples(SCENES, 40, seed=(0, 5)))
    assert rows[:7] == list(long_film_samples(SCENES, 7, seed=(0, 5)))
