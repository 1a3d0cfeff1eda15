from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from reference.simulated_cuda import simulated_cuda
from timeviper_model.batching.batch import IGNORE_INDEX, PADDING_SEGMENT, PackedBatch, Sample, TokenKind, pack_samples


def _sample(num_text: int, num_vision: int) -> Sample:
    length = num_text + num_vision
    return Sample(
        input_ids=[0] * num_vision + list(range(1, num_text + 1)),
        vision_index=[*range(num_vision), *[-1] * num_text],
        token_kind=[TokenKind.VISION] * num_vision + [TokenKind.RESPONSE] * num_text,
        labels=[IGNORE_INDEX] * (length - 1) + [5],
    )


def _packed() -> PackedBatch:
    return pack_samples(
        [_sample(3, 2), _sample(2, 0), _sample(1, 4)],
        [torch.ones(2, 8), torch.zeros(0, 8), torch.full((4, 8), 2.0)],
        pad_to=15,
    )


def test_each_sample_keeps_its_own_rows_and_positions() -> None:
    batch = _packed()
    assert batch.segment_ids.tolist() == [0] * 5 + [1] * 2 + [2] * 5 + [PADDING_SEGMENT] * 3
    assert batch.position_ids.tolist() == [*range(5), *range(2), *range(5), 0, 0, 0]
    assert batch.vision_index.tolist() == [0, 1, -1, -1, -1, -1, -1, 2, 3, 4, 5, -1, -1, -1, -1]
    assert batch.vision_features[batch.vision_index[7:11]].eq(2.0).all()
    assert batch.num_segments == 3


def test_padding_is_never_a_target() -> None:
    assert _packed().labels[12:].eq(IGNORE_INDEX).all()


def test_inconsistent_batches_are_refused() -> None:
    batch = _packed()
    with pytest.raises(ValueError, match="labels has shape"):
        replace(batch, labels=batch.labels[:-1])
    with pytest.raises(ValueError, match="int32"):
        replace(batch, segment_ids=batch.segment_ids.long())
    with pytest.raises(ValueError, match="vision_index ranges from -1 to 5, but there are 5 rows"):
        replace(batch, vision_features=batch.vision_features[:5])
    with pytest.raises(ValueError, match="vision_index ranges from -5"):
        replace(batch, vision_index=batch.vision_index.where(batch.vision_index >= 0, -5))
    with pytest.raises(ValueError, match=r"input_ids must be torch.int64, not torch.float32"):
        replace(batch, input_ids=batch.input_ids.float())
    with pytest.raises(ValueError, match="vision_features must be floating"):
        replace(batch, vision_features=batch.vision_features.long())
    with pytest.raises(ValueError, match="position_ids must count from 0"):
        replace(batch, position_ids=torch.arange(15))
    with pytest.raises(ValueError, match="exactly where"):
        replace(batch, token_kind=torch.zeros_like(batch.token_kind))


@pytest.mark.parametrize(
    ("ids", "wrong"),
    [
        ([0, 0, 1, 1, 0, 0], "segment_ids[4] = 0"),
        ([0, 0, -1, 1, 1, 1], "segment_ids[2] = -1"),
        ([0, 0, 2, 2, 2, 2], "segment_ids[2] = 2"),
        ([1, 1, 1, 2, 2, 2], "segment_ids[0] = 1"),
        ([0, 0, 0, 0, -2, -1], "segment_ids[4] = -2"),
    ],
)
def test_segments_that_are_not_whole_and_in_order_are_refused(ids: list[int], wrong: str) -> None:
    batch = pack_samples([_sample(6, 0)], [torch.zeros(0, 8)])
    with pytest.raises(ValueError, match=re.escape(wrong)):
        replace(batch, segment_ids=torch.tensor(ids, dtype=torch.int32))


def test_moving_to_a_device_does_not_wait() -> None:
    with simulated_cuda() as device:
        moved = _packed().to("cuda", torch.bfloat16)
        assert not device.syncs
        assert moved.to("cpu").segment_ids.tolist() == _packed().segment_ids.tolist()


def test_features_and_samples_must_agree() -> None:
    with pytest.raises(ValueError, match="2 vision tokens but 3 rows"):
        pack_samples([_sample(1, 2)], [torch.ones(3, 8)])
    with pytest.raises(ValueError, match="do not fit"):
        pack_samples([_sample(1, 2)], [torch.ones(2, 8)], pad_to=2)


def test_moving_casts_only_the_features() -> None:
    moved = _packed().to("cpu", torch.bfloat16)
    assert moved.vision_features.dtype == torch.bfloat16
    assert moved.input_ids.dtype == torch.int64
