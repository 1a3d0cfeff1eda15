"""Two vision towers from media to an answer, without Ray: one store, a projector per tower, mismatches are errors."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reference.synthetic_media import make_encoder, make_video
from reference.tiny_serving import generate_alone, prompt
from reference.training_corpus import ANSWERS, QUESTIONS, sample_row, write_samples
from timeviper_model.config import VisionConfig
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.layers.projector import TwoTowerProjector
from timeviper_model.weights.weights_folder import from_pretrained, load_tokenizer
from timeviper_platform.common.config import load_config, parse_config
from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.plan.segments import Segment
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.estimate import estimate
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.preprocess.tasks import TaskResult
from timeviper_platform.data.preprocess.worker import WorkerSpec
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.verify import verify_store
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.data.synthetic.tokenizer import save_tokenizer
from timeviper_platform.data.video.reader import read_frames
from timeviper_platform.evaluation.run import check_inputs
from timeviper_platform.serving.engine.service import EngineService, EngineServiceConfig
from timeviper_platform.serving.features.service import FeatureService, FeatureServiceConfig
from timeviper_platform.serving.messages import (
    AnswerDelta,
    ChatTurn,
    FeatureReference,
    GenerateRequest,
    MediaFile,
)
from timeviper_platform.training.config import InitConfig, TrainConfig
from timeviper_platform.training.local import train_local
from timeviper_platform.training.phase import first_model, first_model_config
from timeviper_platform.training.run import RunFolder

ROOT = Path(__file__).resolve().parents[3]
NUM_FRAMES = {"clip0.mp4": 3, "clip1.mp4": 5}

pytestmark = pytest.mark.usefixtures("group_of_one")


@dataclass(frozen=True)
class Setup:
    """Media, two towers, their feature store and weights trained on it."""

    folder: Path
    preprocess: PreprocessConfig
    train: TrainConfig

    @property
    def weights(self) -> str:
        return RunFolder.of(self.train).weights("align")

    @property
    def store(self) -> FeatureStore:
        return FeatureStore.open(self.preprocess.feature_store)

    def with_one_tower(self, output: str) -> PreprocessConfig:
        return replace(self.preprocess, feature_store=output, encoder=replace(self.preprocess.encoder, second=None))


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, group_of_one: None) -> Setup:
    folder = tmp_path_factory.mktemp("two-towers")
    for name in ("media", "first", "second"):
        (folder / name).mkdir()
    make_encoder(folder / "first", hidden_size=64, seed=0)
    make_encoder(folder / "second", image_size=48, hidden_size=24, seed=1)
    for name, seconds in NUM_FRAMES.items():
        make_video(folder / "media" / name, range(8 * seconds))
    (folder / "manifest.csv").write_text("uri,media_id\n" + "".join(f"media/{name},{name}\n" for name in NUM_FRAMES))
    overrides = [
        f"input={folder / 'manifest.csv'}",
        f"feature_store={folder / 'store'}",
        f"encoder.model={folder / 'first'}",
        "encoder.encode_batch_frames=4",
        f"encoder.second.model={folder / 'second'}",
        "encoder.second.num_tokens_per_frame=3",
        "encoder.second.merge_heads=8",
        "encoder.second.layer=-1",
        "hash=sha256",
    ]
    preprocess = load_config(PreprocessConfig, ROOT / "ray_configs" / "tiny" / "preprocess.yaml", overrides)
    run_preprocess(preprocess, run=run_in_process)
    turns = [("user", QUESTIONS[0]), ("assistant", ANSWERS[0])]
    rows = [sample_row(number, [(name, None, None)], turns) for number, name in enumerate(NUM_FRAMES)]
    write_samples(folder / "samples.parquet", rows)
    save_tokenizer([*QUESTIONS, *ANSWERS], 280, folder / "tokenizer")
    train = parse_config(TrainConfig, train_values(folder))
    train_local(train)
    return Setup(folder, preprocess, train)


def train_values(folder: Path, **changes: Any) -> dict[str, Any]:
    phase = {
        "init": {"preset": "tiny", "seed": 3},
        "samples": [{"uri": str(folder / "samples.parquet")}],
        "trainable": [{"match": ".*", "lr": 1e-3}],
        "packing": {"max_tokens": 160},
        "packs_per_step": 1,
        "steps": 1,
    }
    return {
        "name": "two",
        "runs": str(folder / "runs"),
        "feature_store": str(folder / "store"),
        "tokenizer": str(folder / "tokenizer"),
        "encoder": "the/first",
        "second_encoder": "the/second",
        "phases": {"align": phase},
        "metrics": {"tensorboard": False},
        **changes,
    }


def test_frames_are_decoded_once_for_both_towers(setup: Setup) -> None:
    encoder, store = FrameEncoder(setup.preprocess.encoder), setup.store
    for name, num_frames in NUM_FRAMES.items():
        info = store.info(name)
        assert (info.num_frames, info.num_tokens_per_frame, info.dim) == (num_frames, 4 + 3, 64)
        frames = read_frames(str(setup.folder / "media" / name), 48).frames
        features = store.read(name).features
        assert torch.equal(features.view(torch.int16), encoder.encode(frames).view(torch.int16))
        assert not features[:, 4:, 24:].any()  # padding up to the first tower's width
        assert features[:, 4:, :24].any()
    assert verify_store(setup.preprocess.feature_store).problems == []
    report = json.loads((setup.folder / "store" / "report.json").read_text())
    assert report["frames_encoded"] == 8
    plan = estimate(replace(setup.preprocess, feature_store=str(setup.folder / "nowhere")))
    assert plan.feature_bytes == 8 * 7 * 64 * 2


def test_workers_get_both_towers_and_the_larger_image_size(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: list[WorkerSpec] = []

    def run(missing: Collection[Segment], spec: WorkerSpec, execution: ExecutionConfig) -> Iterator[TaskResult]:
        specs.append(spec)
        return run_in_process(missing, spec, execution)

    monkeypatch.chdir(setup.folder)
    encoder = setup.preprocess.encoder
    assert encoder.second is not None
    encoder = replace(encoder, model="first", second=replace(encoder.second, model="second"))
    run_preprocess(replace(setup.preprocess, feature_store=str(tmp_path / "store"), encoder=encoder), run=run)
    (spec,) = specs
    assert spec.encoder == setup.preprocess.encoder  # with absolute folders
    assert spec.image_size == 48


def test_a_store_of_one_tower_cannot_be_continued_with_two_or_the_reverse(setup: Setup, tmp_path: Path) -> None:
    one = setup.with_one_tower(setup.preprocess.feature_store)
    with pytest.raises(ValueError, match=r"second: the store has \{.*\}, this run None"):
        run_preprocess(one, run=run_in_process)
    run_preprocess(replace(one, feature_store=str(tmp_path / "one")), run=run_in_process)
    with pytest.raises(ValueError, match=r"second: the store has None, this run \{.*'hidden_size': 24"):
        estimate(replace(setup.preprocess, feature_store=str(tmp_path / "one")))
    second = replace(setup.preprocess.encoder.second, num_tokens_per_frame=4)
    other = replace(setup.preprocess, encoder=replace(setup.preprocess.encoder, second=second))
    with pytest.raises(ValueError, match=r"second\.merge\.num_tokens_per_frame: the store has 3, this run 4"):
        run_preprocess(other, run=run_in_process)


def test_training_updates_a_projector_per_tower(setup: Setup) -> None:
    trained = from_pretrained(setup.weights)
    expected = VisionConfig(encoder="the/second", layer=-1, num_tokens_per_frame=3, merge_heads=8, hidden_size=24)
    assert trained.config.vision.second == expected
    assert (trained.config.vision.encoder, trained.config.vision.hidden_size) == ("the/first", 64)
    assert isinstance(trained.projector, TwoTowerProjector)
    init = setup.train.phases["align"].init
    assert init is not None
    before = first_model(init, setup.store, None).state_dict()
    after = trained.state_dict()
    for name in ("projector.first.fc1.weight", "projector.second.fc1.weight"):
        assert not torch.equal(before[name], after[name])


def test_an_upload_is_encoded_by_both_towers(setup: Setup) -> None:
    config = FeatureServiceConfig(encoder=setup.preprocess.encoder)
    service = FeatureService(setup.weights, config, lambda array: array)
    file = MediaFile(uri=str(setup.folder / "media" / "clip1.mp4"), sha256="unknown", modality="video")

    async def scenario() -> tuple[FeatureReference, str]:
        try:
            reference = await service.features(file)
        finally:
            await service.close()
        assert isinstance(reference, FeatureReference)
        return reference, await answer(setup.weights, reference)

    reference, text = asyncio.run(scenario())
    stored = setup.store.read("clip1.mp4").features
    assert np.array_equal(reference.ref, stored.view(torch.int16).numpy())
    assert reference.num_tokens_per_frame == 7
    model, tokenizer = from_pretrained(setup.weights), load_tokenizer(setup.weights)
    sample, end_id = prompt(tokenizer, "What?", 5 * 7), tokenizer.convert_tokens_to_ids("<SPECIAL_12>")
    rows = stored.flatten(0, 1).float()
    ids = generate_alone(model, sample, rows, num_tokens=8, end_ids=frozenset({end_id}))
    assert text == tokenizer.decode([i for i in ids if i != end_id], skip_special_tokens=True)
    assert text


async def answer(weights: str, video: FeatureReference) -> str:
    async def read(reference: FeatureReference) -> AsyncGenerator[np.ndarray]:
        yield reference.ref

    service = EngineService(weights, EngineServiceConfig(), read)
    request = GenerateRequest(
        tenant="a",
        turns=(ChatTurn(role="user", text="What?", media=(video,)),),
        sampling=SamplingParams(max_new_tokens=8),
    )
    try:
        return "".join([part.text async for part in service.generate(request) if isinstance(part, AnswerDelta)])
    finally:
        service.stop()


def serving(setup: Setup, weights: str, **changes: Any) -> None:
    values = {"feature_store": setup.preprocess.feature_store, "encoder": setup.preprocess.encoder, **changes}
    FeatureService(weights, FeatureServiceConfig(**values), lambda array: array)


def training(setup: Setup, weights: str, store: str) -> None:
    first_model_config(InitConfig(weights=weights), FeatureStore.open(store), None)


def test_one_tower_instead_of_two_is_an_error_that_names_both(setup: Setup, tmp_path: Path) -> None:
    one = setup.with_one_tower(str(tmp_path / "one"))
    run_preprocess(one, run=run_in_process)
    refused: list[tuple[Callable[[], object], str, str]] = [
        (lambda: training(setup, setup.weights, one.feature_store), "num_towers: 2 and 1", one.feature_store),
        (lambda: check_inputs(setup.weights, one.feature_store), "num_towers: 2 and 1", one.feature_store),
        (
            lambda: serving(setup, setup.weights, feature_store=one.feature_store, encoder=None),
            "num_towers: 2 and 1",
            one.feature_store,
        ),
        (
            lambda: serving(setup, setup.weights, feature_store=None, encoder=one.encoder),
            "num_towers: 2 and 1",
            setup.weights,
        ),
        (
            lambda: serving(setup, setup.weights, encoder=one.encoder),
            "num_towers: 1 and 2",
            setup.preprocess.feature_store,
        ),
    ]
    for act, difference, name in refused:
        with pytest.raises(ValueError, match=difference) as caught:
            act()
        assert name in str(caught.value)
    serving(setup, setup.weights)
    check_inputs(setup.weights, setup.preprocess.feature_store)
    training(setup, setup.weights, setup.preprocess.feature_store)


@pytest.mark.parametrize(("fact", "value", "stored"), [("num_tokens_per_frame", 8, 3), ("hidden_size", 16, 24)])
def test_another_second_tower_is_an_error_with_both_values(
    setup: Setup, tmp_path: Path, fact: str, value: int, stored: int
) -> None:
    config = json.loads((Path(setup.weights) / "config.json").read_text())
    wrong = copy.deepcopy(config)
    wrong["vision_config"]["second"][fact] = value
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    message = rf"second\.{fact}: {value} and {stored}"
    for act in (
        lambda: training(setup, str(tmp_path), setup.preprocess.feature_store),
        lambda: check_inputs(str(tmp_path), setup.preprocess.feature_store),
        lambda: serving(setup, str(tmp_path), encoder=None),
        lambda: serving(setup, str(tmp_path), feature_store=None),
    ):
        with pytest.raises(ValueError, match=message):
            act()


def test_a_first_tower_of_another_width_than_the_preset_is_an_error(setup: Setup, tmp_path: Path) -> None:
    recipe = {**setup.store.recipe, "hidden_size": 16}
    write_store(str(tmp_path / "narrow"), {"a": torch.zeros(2, 7, 24)}, recipe=recipe)
    with pytest.raises(ValueError, match="have width 16, the model's projector takes 64"):
        first_model_config(InitConfig(preset="tiny"), FeatureStore.open(str(tmp_path / "narrow")), None)
