from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reference.small_models import SMALL, make_model, make_sample
from timeviper_model.batching.batch import pack_samples
from timeviper_model.config import TimeViperConfig, VisionConfig
from timeviper_model.layers.projector import TwoTowerProjector, combine_towers
from timeviper_model.weights.weights_folder import from_pretrained, save_pretrained


def two_towers(num_second: int, second_size: int = 5) -> TimeViperConfig:
    second = VisionConfig(encoder="other", num_tokens_per_frame=num_second, hidden_size=second_size)
    return replace(SMALL, vision=replace(SMALL.vision, second=second))


@pytest.mark.parametrize(
    ("num_second", "expected"), [(2, [10, 20, 11, 21]), (1, [10, 11, 20]), (3, [10, 11, 20, 21, 22])]
)
def test_rows_of_two_towers_interleave_where_their_counts_agree(num_second: int, expected: list[int]) -> None:
    first = torch.tensor([[[10.0, 1.0], [11.0, 1.0]], [[12.0, 1.0], [13.0, 1.0]]])
    second = torch.tensor([[[20.0], [21.0], [22.0]], [[23.0], [24.0], [25.0]]])[:, :num_second]
    rows = combine_towers(first, second)
    assert rows[0, :, 0].tolist() == expected
    assert rows.shape == (2, 2 + num_second, 2)
    assert rows[0, :, 1].tolist() == [1.0 if value < 20 else 0.0 for value in expected]


@pytest.mark.parametrize("num_second", [4, 3])
@pytest.mark.parametrize("second_size", [5, 17])
def test_each_towers_tokens_go_through_its_own_projector(num_second: int, second_size: int) -> None:
    model = make_model(two_towers(num_second, second_size))
    projector = model.projector
    assert isinstance(projector, TwoTowerProjector)
    first, second = (
        torch.randn(6, count, size, dtype=torch.float64) for count, size in ((4, 12), (num_second, second_size))
    )
    rows = combine_towers(first, second).flatten(0, 1)
    none = torch.zeros(0, dtype=torch.long)
    expected = combine_towers(projector.first(first, none), projector.second(second, none)).flatten(0, 1)
    torch.testing.assert_close(projector(rows, torch.arange(len(rows))), expected)
    some = torch.tensor([3, 9, 4, 20])  # any selection of tokens, each with its row
    torch.testing.assert_close(projector(rows[some], some), expected[some])


def losses(batches: list[list[str]]) -> list[Tensor]:
    model = make_model(two_towers(4), seed=2)
    results = []
    for layouts in batches:
        samples = [make_sample(layout, seed=len(layout)) for layout in layouts]
        features = [
            combine_towers(
                torch.randn(n // 8, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(n)),
                torch.randn(n // 8, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n + 1)),
            ).flatten(0, 1)
            for n in (sample.num_vision_tokens for sample in samples)
        ]
        model.zero_grad()
        results.append(model(pack_samples(samples, features)).loss_sum)
        results[-1].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    return results


def test_packs_of_two_tower_samples_equal_separate_ones_and_train_both_projectors() -> None:
    a, b, text = "s" + "v" * 8 + "iirr", "v" * 16 + "iirrr", "siirr"
    packed, *separate = losses([[a, text, b], [a], [text], [b]])
    assert packed.item() == pytest.approx(sum(loss.item() for loss in separate))


def test_two_tower_weights_come_back_and_one_tower_files_need_no_new_key(tmp_path: Path) -> None:
    model = make_model(two_towers(4), dtype=torch.float32)
    save_pretrained(model, tmp_path / "weights")
    loaded = from_pretrained(tmp_path / "weights")
    assert loaded.config == model.config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    save_pretrained(make_model(dtype=torch.float32), tmp_path / "one")
    path = tmp_path / "one" / "config.json"
    path.write_text(path.read_text().replace('"second": null', '"ignored": null'))
    assert from_pretrained(tmp_path / "one").config == SMALL
