"""What the platform does on a GPU, on a simulated one: encoding, a training step, held-out answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from reference.simulated_cuda import simulated_cuda
from reference.small_models import make_features, make_model, make_sample, pack
from reference.synthetic_media import make_encoder
from timeviper_model.batching.batch import pack_samples
from timeviper_model.inference.prefill import prefill
from timeviper_model.timeviper import TimeViper
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, TowerConfig, VisionTowerConfig
from timeviper_platform.training.batches.collate import dummy_batch
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.batches.step_batches import MicroBatch, StepBatches, StepCounts
from timeviper_platform.training.interrupts import Interrupt
from timeviper_platform.training.step import StepResult, TrainContext, agree, train_step, validation_loss
from timeviper_platform.training.validation.exact_match import answer_task, exact_match_share


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frames_are_encoded_by_two_towers(tmp_path: Path, dtype: Any) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    first, second = (str(make_encoder(folder, seed=seed)) for seed, folder in enumerate(folders))
    options = {"model": first, "dtype": dtype, "merge_heads": 4, "encode_batch_frames": 4}
    other = TowerConfig(model=second, num_tokens_per_frame=4, merge_heads=4)
    encoder = FrameEncoder(VisionTowerConfig(second=other, **options))
    frames = torch.randint(0, 256, (6, encoder.image_size, encoder.image_size, 3), dtype=torch.uint8).numpy()
    expected = encoder.encode(frames)
    with simulated_cuda() as device:
        found = FrameEncoder(VisionTowerConfig(device="cuda", second=other, **options)).encode(frames)
        assert dict(device.syncs) == {"_to_copy": 2}  # one for each batch's tokens
    assert found.device.type == "cpu"
    tolerance = 0.05 if dtype == "bfloat16" else 0.0  # attention of the CPU alone is fused
    torch.testing.assert_close(found, expected, rtol=0.016, atol=1e-5 + tolerance)


class PlainEngine:
    """What a step asks of a ds_engine, by one process and plain gradient descent."""

    def __init__(self, model: TimeViper) -> None:
        self.module = model

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        loss.backward()

    def zero_optimization(self) -> bool:
        return False

    def bfloat16_enabled(self) -> bool:
        return False

    def step(self) -> None:
        pass


def step_of(layouts: list[str]) -> StepBatches:
    batches = [pack([make_sample(layout, seed=number)]) for number, layout in enumerate(layouts)]
    dummy = dummy_batch(batches[0].vision_features.shape[1], pad_token_id=0)
    counts = StepCounts(
        step=1,
        num_targets=sum(int((b.labels >= 0).sum()) for b in batches),
        num_tokens=0,
        num_vision_tokens=0,
        num_samples=len(batches),
        num_padding_tokens=0,
        fill=1.0,
        flops=0.0,
        end=PackPosition(0, 0),
    )
    return StepBatches(counts, [*map(MicroBatch, batches), MicroBatch(dummy, is_dummy=True)])


def trained(place: str) -> tuple[StepResult, float, dict[str, torch.Tensor]]:
    model = make_model().to(place)
    context = TrainContext(device=torch.device(place), dtype=torch.float64, use_transv=True)
    batches = agree(step_of(["ssvvvvviirr", "svvviirr"]), Interrupt.NONE, device=torch.device(place)).batches
    result = train_step(PlainEngine(model), batches, context)
    loss = validation_loss(PlainEngine(model), [batches], context)
    return result, loss, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A simulated device, and a group of one process, whose sums are its own."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    with simulated_cuda():
        yield


@pytest.mark.slow
def test_a_training_step(alone: None) -> None:
    found, expected = trained("cuda"), trained("cpu")
    assert found[0].loss == pytest.approx(expected[0].loss)
    assert found[0].grad_norm == pytest.approx(expected[0].grad_norm)
    assert found[0].num_vision_tokens == expected[0].num_vision_tokens
    assert found[1] == pytest.approx(expected[1])
    torch.testing.assert_close(found[2], expected[2])


def test_held_out_answers(alone: None) -> None:
    sample = make_sample("ssvvvvviirr")
    model = make_model().eval()
    shares = []
    for place in ("cpu", "cuda"):
        model = model.to(place)
        where = {"device": torch.device(place), "dtype": torch.float64}
        task = answer_task(sample, make_features(sample))
        cache = model.new_cache(1, **where)
        first = prefill(model, pack_samples([task.prompt], [task.features]).to(**where), cache, 0).argmax()
        second = model.decode_step(first[None], cache, torch.zeros(1, dtype=torch.long, device=place)).argmax()
        answers = [int(first), int(second)], [int(first), int(second) + 1]
        shares.append(exact_match_share(model, [task._replace(answer=answer) for answer in answers], **where))
    assert shares == [0.5, 0.5]
