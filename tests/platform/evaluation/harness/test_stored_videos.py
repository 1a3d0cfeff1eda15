from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from reference.known_answers import NAMES, WHICH, KnownAnswers
from timeviper_platform.data.media.medium import media_id_of
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.evaluation.evaluator import AnsweringConfig
from timeviper_platform.evaluation.harness.stored_videos import (
    Asked,
    StoredVideo,
    StoredVideoAnswerer,
    video_path,
)
from timeviper_platform.evaluation.harness.task_files import write_task_files

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def store(known: KnownAnswers, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The known videos by their paths, and a film in which the second second onwards is another video."""
    uri = str(tmp_path_factory.mktemp("store") / "features")
    source = FeatureStore.open(known.feature_store)
    rows = [source.read(f"video-{number}").features for number in range(4)]
    media = {media_id_of(f"clips/v{number}.mp4", ""): rows[number] for number in range(4)}
    media[media_id_of("film.mp4", "")] = rows[0].repeat(75, 1, 1)
    media[media_id_of("two.mp4", "")] = rows[1].new_tensor(rows[1].tolist() + rows[2].tolist())
    write_store(uri, media, recipe={"synthetic": "harness"})
    return uri


@pytest.fixture
def answerer(known: KnownAnswers, store: str) -> StoredVideoAnswerer:
    return _answerer(known, store)


def _answerer(known: KnownAnswers, store: str, **options: str) -> StoredVideoAnswerer:
    return StoredVideoAnswerer(
        weights=known.weights, feature_store=store, config=AnsweringConfig(), media_root="/data", **options
    )


def _asked(*paths: str) -> list[Asked]:
    return [Asked(parts=(StoredVideo(path=f"/data/{path}"), WHICH)) for path in paths]


def test_videos_are_found_by_path_and_answered_in_the_order_of_the_requests(answerer: StoredVideoAnswerer) -> None:
    asked = _asked(*(f"clips/v{number}.mp4" for number in (2, 0, 2, 1)))
    answer = dict(answerer.generate(asked, max_new_tokens=8))
    assert [answer[index].text for index in range(4)] == [NAMES[number] for number in (2, 0, 2, 1)]
    assert sorted(answer[index].num_cached_tokens > 0 for index in (0, 2)) == [False, True], "one video, read once"


def test_clip_bounds_choose_the_frames(answerer: StoredVideoAnswerer) -> None:
    clips = [StoredVideo(path="/data/two.mp4", start_seconds=start, end_seconds=start + 4.0) for start in (0.0, 4.0)]
    answer = dict(answerer.generate([Asked(parts=(clip, WHICH)) for clip in clips], max_new_tokens=8))
    assert [answer[index].text for index in range(2)] == [NAMES[1], NAMES[2]]


def test_the_papers_protocol_sees_the_first_256_frames(known: KnownAnswers, store: str) -> None:
    film = _asked("film.mp4")
    num_tokens = {}
    for protocol in ("paper", "whole"):
        ((_, answer),) = _answerer(known, store, protocol=protocol).generate(film, max_new_tokens=1)
        num_tokens[protocol] = answer.num_prompt_tokens
    ((_, answer),) = _answerer(known, store).generate(_asked("clips/v0.mp4"), max_new_tokens=1)
    assert num_tokens == dict.fromkeys(("paper", "whole"), answer.num_prompt_tokens + 252)
    with pytest.raises(ValueError, match="must be paper or whole"):
        _answerer(known, store, protocol="first")


def test_losses_are_means_over_tokens_and_lowest_for_the_right_option(answerer: StoredVideoAnswerer) -> None:
    asked = _asked("clips/v1.mp4") * 4
    losses = {index: (loss, is_greedy) for index, loss, is_greedy in answerer.losses(asked, [f" {n}" for n in NAMES])}
    assert min(losses, key=lambda index: losses[index][0]) == 1
    assert [losses[index][1] for index in range(4)] == [False, True, False, False]
    assert all(math.isfinite(loss) and loss > 0 for loss, _ in losses.values())
    assert losses[1][0] < 0.1


def test_a_missing_video_is_named_before_any_answer(answerer: StoredVideoAnswerer) -> None:
    with pytest.raises(ValueError, match=r"lacks /data/clips/v9\.mp4; preprocess it, or set media_root"):
        answerer.check(_asked("clips/v0.mp4", "clips/v9.mp4"))
    outside = replace(_asked("clips/v0.mp4")[0], parts=(StoredVideo(path="/elsewhere/clips/v0.mp4"),))
    with pytest.raises(ValueError, match="lacks /elsewhere"):
        answerer.check([outside])
    late = StoredVideo(path="/data/clips/v0.mp4", start_seconds=90.0, end_seconds=95.0)
    with pytest.raises(ValueError, match="no frame"):
        answerer.check([Asked(parts=(late,))])


def test_file_addresses_are_paths() -> None:
    assert video_path("file:///data/a.mp4") == video_path("/data/a.mp4") == "/data/a.mp4"
    assert video_path("s3://bucket/a.mp4") == "s3://bucket/a.mp4"


def test_the_entry_point_names_a_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["timeviper"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_task_files_lie_beside_the_benchmark_and_name_its_table(tmp_path: Path) -> None:
    folder = Path(write_task_files(str(tmp_path)))
    assert write_task_files(str(tmp_path)) == str(tmp_path / "lmms_eval"), "a second time as well"
    assert {path.name for path in folder.iterdir()} == {
        "timeviper_synth.yaml",
        "timeviper_synth_choice.yaml",
        "timeviper_synth_words.yaml",
        "timeviper_synth_grounding.yaml",
        "utils.py",
    }
    assert "test: ../test.parquet" in (folder / "timeviper_synth_choice.yaml").read_text()
