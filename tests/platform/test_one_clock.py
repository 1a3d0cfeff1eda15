"""Training, evaluation and serving read the same frames of the same clip."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch

from reference.synthetic_media import make_video
from reference.synthetic_store import segment_row, write_files
from reference.tiny_serving import IMAGE_SIZE, byte_tokenizer, make_serving_folders
from reference.training_corpus import sample_row
from timeviper_model.batching.batch import TokenKind
from timeviper_model.batching.prompt import NEMOTRON
from timeviper_model.weights.weights_folder import from_pretrained
from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.video.reader import read_frames
from timeviper_platform.evaluation.answering import Answerer
from timeviper_platform.evaluation.evaluator import AnsweringConfig, read_media, read_prompt
from timeviper_platform.serving.engine.service import build_prompt
from timeviper_platform.serving.features.service import FeatureService, FeatureServiceConfig
from timeviper_platform.serving.messages import ChatTurn, FeatureReference, StoredFeatures
from timeviper_platform.training.batches.samples import FramesConfig, SampleBuilder, TokenizedSample

NTSC = Fraction(30000, 1001)
"""29.97 frames per second: the frame on screen at t has a PTS up to 33 ms before t."""


class Ntsc(NamedTuple):
    """A store with a 29.97 fps video of 25 s, and weights that fit it."""

    weights: str
    uri: str
    store: FeatureStore


@pytest.fixture(scope="module")
def ntsc(tmp_path_factory: pytest.TempPathFactory) -> Ntsc:
    folder = tmp_path_factory.mktemp("ntsc")
    folders = make_serving_folders(folder)
    make_video(folder / "ntsc.mp4", [1001 * k for k in range(int(25 * NTSC))], time_base=Fraction(1, 30000))
    sampled = read_frames(str(folder / "ntsc.mp4"), IMAGE_SIZE, fps=Fraction(1))
    row = segment_row(
        "ntsc",
        0,
        1,
        FrameEncoder(folders.encoder).encode(sampled.frames),
        frame_times_seconds=sampled.times_seconds.tolist(),
        frame_pts_seconds=sampled.pts_seconds.tolist(),
    )
    uri = str(folder / "clips")
    write_files(uri, {"ntsc": [row]}, recipe=FrameEncoder(folders.encoder).recipe)
    return Ntsc(folders.weights, uri, FeatureStore.open(uri))


def trained(ntsc: Ntsc, start: float | None, end: float | None, max_frames: int | None) -> list[int]:
    """Indices of the frames that a training sample takes."""
    builder = SampleBuilder(ntsc.store, byte_tokenizer(), "nemotron", FramesConfig(max_frames=max_frames))
    built = builder.build(sample_row(0, [("ntsc", start, end)], [("user", "When?"), ("assistant", "Now")]))
    assert isinstance(built, TokenizedSample)
    return built.frames[0]


def evaluated(ntsc: Ntsc, start: float | None, end: float | None, max_frames: int | None) -> torch.Tensor:
    """(F * N, dim) features that a question is answered from."""
    question = {"media": [{"media_id": "ntsc", "start_seconds": start, "end_seconds": end}]}
    config = AnsweringConfig(max_frames=max_frames, frame_selection="uniform")
    media = read_media(ntsc.store, question, config, dim=ntsc.store.info("ntsc").dim)
    assert media is not None
    return media[0]


def served(ntsc: Ntsc, max_frames: int) -> np.ndarray:
    """(F, N, dim) bits of the features that a request gets."""
    config = FeatureServiceConfig(feature_store=ntsc.uri, max_frames=max_frames)
    service = FeatureService(ntsc.weights, config, lambda array: array)
    answer = asyncio.run(service.features(StoredFeatures(media_id="ntsc")))
    assert isinstance(answer, FeatureReference)
    return np.asarray(answer.ref)


def test_a_clip_of_a_29_97_fps_video_holds_the_same_frames_for_training_and_evaluation(ntsc: Ntsc) -> None:
    info = ntsc.store.info("ntsc")
    assert info.pts_seconds[10] < 10 < info.pts_seconds[11]  # by PTS, the frame sampled at 10 s would not be in it
    assert info.select(start_seconds=10, end_seconds=20) == list(range(10, 20))
    assert trained(ntsc, 10, 20, None) == list(range(10, 20))
    expected = ntsc.store.read("ntsc", range(10, 20)).features.flatten(0, 1)
    assert torch.equal(evaluated(ntsc, 10, 20, None), expected)
    assert trained(ntsc, 10, 20, 4) == info.select(max_frames=4, start_seconds=10, end_seconds=20) == [10, 13, 16, 19]


def test_a_whole_29_97_fps_video_is_thinned_to_the_same_frames_everywhere(ntsc: Ntsc) -> None:
    chosen = trained(ntsc, None, None, 7)
    expected = ntsc.store.read("ntsc", chosen).features
    assert torch.equal(evaluated(ntsc, None, None, 7), expected.flatten(0, 1))
    assert np.array_equal(served(ntsc, 7), expected.view(torch.int16).numpy())


@pytest.mark.parametrize("clip", [(None, None), (10.0, 22.5)])
def test_a_question_about_times_is_the_same_prompt_in_training_evaluation_and_serving(
    ntsc: Ntsc, clip: tuple[float | None, float | None]
) -> None:
    tokenizer, question = byte_tokenizer(), "When does it happen?"
    row = {**sample_row(0, [("ntsc", *clip)], [("user", question), ("assistant", "Now")]), "kind": "temporal"}
    built = SampleBuilder(ntsc.store, tokenizer, "nemotron", FramesConfig(max_frames=7)).build(row)
    assert isinstance(built, TokenizedSample)
    length = built.sample.token_kind.index(TokenKind.RESPONSE)
    trained_ids = built.sample.input_ids[:length]
    seconds = ntsc.store.info("ntsc").duration_seconds if clip[0] is None else 12.5
    sentence = f"The video lasts for {seconds:.2f} seconds, and 7 frames are uniformly sampled from it.\nWhen"
    assert sentence in tokenizer.decode(trained_ids)

    asked = {"media": row["media"], "question": question, "start_seconds": 1.0, "end_seconds": 2.0}
    config = AnsweringConfig(max_frames=7, frame_selection="uniform")
    model = from_pretrained(ntsc.weights)
    prompt = read_prompt(ntsc.store, asked, config, dim=model.config.vision.row_size, trained="temporal")
    assert prompt is not None
    assert Answerer(model, tokenizer).sample(prompt, None).input_ids == trained_ids
    asked["start_seconds"] = None
    plain = read_prompt(ntsc.store, asked, config, dim=model.config.vision.row_size, trained="temporal")
    assert plain is not None
    assert plain.time_texts == ()

    reference = FeatureReference(
        key="",
        ref=None,
        num_frames=7,
        num_tokens_per_frame=len(prompt.media[0]) // 7,
        modality="video",
        duration_seconds=seconds,
    )
    turns = [ChatTurn(role="user", text=question, media=(reference,))]
    assert build_prompt(tokenizer, turns, NEMOTRON, with_time_text=True).input_ids == trained_ids


def test_a_clip_is_thinned_to_a_lower_rate_before_it_is_thinned_to_a_number(ntsc: Ntsc) -> None:
    info = ntsc.store.info("ntsc")
    assert info.select(start_seconds=10, end_seconds=20, fps=0.5) == [10, 12, 14, 16, 18]
    assert info.select(start_seconds=10, end_seconds=20, fps=0.5, max_frames=3) == [10, 14, 18]
    assert info.select(fps=0.2, max_frames=2, frame_selection="first") == [0, 5]
    assert info.select(fps=30.0) == info.select() == list(range(info.num_frames))
