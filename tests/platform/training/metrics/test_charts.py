from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest

from timeviper_platform.training.metrics.charts import MAX_POINTS, draw_curves


def drawn(svg: bytes, name: str) -> list[list[str]]:
    """Coordinates of each line of the name, in the order of the panels."""
    paths = ElementTree.fromstring(svg).findall(f".//{{*}}g[@id='{name}']/{{*}}path")
    return [[word for word in path.attrib["d"].split() if word not in "ML"] for path in paths]


def rows_of(*phases: str) -> list[dict[str, Any]]:
    return [
        {
            "phase": phase,
            "global_step": step,
            "loss": 10.0 / step,
            "lr": {"projector decay": 0.1 / step, "projector no decay": 0.1 / step, "backbone decay": 0.01},
            "grad_norm": float(step),
            "tokens_per_second": 100.0 * step,
        }
        for step, phase in enumerate(phases, start=1)
    ]


def test_every_phase_has_a_line_in_each_panel_and_dots_of_its_validation_loss() -> None:
    rows = rows_of(*["align"] * 3, *["in<struct"] * 3)
    rows[5]["validation_loss"] = 3.0
    svg = draw_curves(rows, "run & more")
    assert [len(line) for line in drawn(svg, "align")] == [6, 6, 6]  # loss, gradient norm, tokens/s
    assert [len(line) for line in drawn(svg, "in<struct")] == [6, 6, 6]
    heights = [float(y) for y in drawn(svg, "align")[0][1::2]]
    assert heights == sorted(heights)  # y grows downwards: the loss falls
    root = ElementTree.fromstring(svg)
    assert len(root.findall(".//{*}g[@id='in<struct dots']//{*}use")) == 1
    assert not root.findall(".//{*}g[@id='align dots']//{*}use")


def test_loss_is_logarithmic() -> None:
    (_, y0, _, y1, _, y2, *_) = (float(word) for word in drawn(draw_curves(rows_of(*["p"] * 4), "t"), "p")[0])
    assert (y1 - y0) / (y2 - y1) == pytest.approx(math.log(2) / math.log(1.5), rel=1e-3)  # 10, 5, 3.33


def test_groups_with_equal_rates_share_a_line_and_names_appear_once() -> None:
    svg = draw_curves(rows_of(*["align"] * 3, *["instruct"] * 3), "t")
    assert len(drawn(svg, "rate of projector")) == len(drawn(svg, "rate of backbone")) == 1
    for name in ("align", "instruct", "rate of projector", "learning rate", "gradient norm", "loss (nats per token)"):
        assert svg.decode().count(f">{name}<") == 1, name


def test_a_long_curve_is_thinned() -> None:
    rows = [{"phase": "p", "global_step": step, "loss": 1.0 + step % 2} for step in range(3 * MAX_POINTS)]
    (line,) = drawn(draw_curves(rows, "long"), "p")
    assert len(line) <= 2 * (MAX_POINTS + 1)  # matplotlib may add a point at the edge


def test_a_run_without_rows_gives_a_picture() -> None:
    assert ElementTree.fromstring(draw_curves([], "nothing")).tag.endswith("svg")
