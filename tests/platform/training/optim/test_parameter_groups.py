from __future__ import annotations

import math

import pytest
import torch

from timeviper_model.config import PRESETS
from timeviper_model.timeviper import TimeViper
from timeviper_platform.training.optim.lr_schedule import ScheduleConfig, learning_rate_factor
from timeviper_platform.training.optim.parameter_groups import (
    ParameterRule,
    describe_groups,
    freeze_others,
    resolve_groups,
)


@pytest.fixture(scope="module")
def model() -> TimeViper:
    with torch.device("meta"):
        return TimeViper(PRESETS["tiny"])


def test_rules_become_groups_and_only_matrices_decay(model: TimeViper) -> None:
    rules = [
        ParameterRule(match=r"projector\..*", lr=1e-3),
        ParameterRule(match=r"transv\..*", lr=5e-3, weight_decay=0.1),
    ]
    groups = resolve_groups(model, rules)
    assert [(g.lr, g.weight_decay) for g in groups] == [(1e-3, 0.01), (1e-3, 0.0), (5e-3, 0.1), (5e-3, 0.0)]
    assert groups[0].parameter_names == ("projector.fc1.weight", "projector.fc2.weight")
    assert groups[0].num_parameters == 64 * 128 + 128 * 128
    assert groups[3].parameter_names == ("transv.3.alpha", "transv.8.alpha")
    freeze_others(model, groups)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for group in groups for name in group.parameter_names}
    shown = describe_groups(groups, 1_000_000)
    assert "projector\\..* decay: 2 tensors, 24,576 parameters, lr 0.001, weight decay 0.01" in shown


def test_a_rule_without_a_match_is_an_error_that_lists_the_names(model: TimeViper) -> None:
    with pytest.raises(
        ValueError, match=r"'projektor.*matches no parameter; there are .*backbone\.layers\.\*\.mixer"
    ) as e:
        resolve_groups(model, [ParameterRule(match=r"projektor\..*", lr=1e-3)])
    assert "layers.3" not in str(e.value)


def test_a_parameter_under_two_rules_is_an_error(model: TimeViper) -> None:
    rules = [ParameterRule(match=".*", lr=1e-3), ParameterRule(match=r"transv\..*", lr=1e-3)]
    with pytest.raises(ValueError, match=r"transv\.3\.\w+.* matches both '\.\*' and 'transv"):
        resolve_groups(model, rules)


def test_a_rule_with_an_invalid_expression_is_an_error() -> None:
    with pytest.raises(ValueError, match="is not a regular expression"):
        ParameterRule(match="(", lr=1e-3)


def test_learning_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    config = ScheduleConfig(warmup_ratio=0.1, final_ratio=0.2)
    factors = [learning_rate_factor(step, 100, config) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[10 + 44] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 45 / 91)))
    assert 0.2 < factors[-1] < 0.21


def test_without_warm_up_the_first_step_is_nearly_full() -> None:
    assert learning_rate_factor(1, 1, ScheduleConfig(warmup_ratio=0.0)) == pytest.approx(0.5)
    assert learning_rate_factor(1, 1000, ScheduleConfig(warmup_ratio=0.0)) > 0.999
