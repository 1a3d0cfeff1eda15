from __future__ import annotations

from xml.etree import ElementTree

from timeviper_platform.training.metrics.charts import MAX_POINTS, draw_curves


def drawn(svg: bytes, name: str) -> list[list[str]]:
    """Coordinates of each line of the name, in the order of the panels."""
    paths = ElementTree.fromstring(svg).findall(f".//{{*}}g[@id='{name}']/{{*}}path")
    return [[word for word in path.attrib["d"].split() if word not in "ML"] for path in paths]


def test_every_phase_has_a_line_in_both_panels_and_dots_of_its_validation_loss() -> None:
    rows = [
        {"phase": phase, "global_step": step, "loss": 10.0 / step, "tokens_per_second": 100.0 * step}
        for step, phase in enumerate(["align"] * 3 + ["in<struct"] * 3, start=1)
    ]
    rows[5]["validation_loss"] = 3.0
    svg = draw_curves(rows, "run & more")
    assert [len(line) for line in drawn(svg, "align")] == [6, 6]
    assert [len(line) for line in drawn(svg, "in<struct")] == [6, 6]
    heights = [float(y) for y in drawn(svg, "align")[0][1::2]]
    assert heights == sorted(heights)  # y grows downwards: the loss falls
    root = ElementTree.fromstring(svg)
    assert len(root.findall(".//{*}g[@id='in<struct dots']//{*}use")) == 1
    assert not root.findall(".//{*}g[@id='align dots']//{*}use")


def test_a_long_curve_is_thinned() -> None:
    rows = [{"phase": "p", "global_step": step, "loss": float(step % 2)} for step in range(3 * MAX_POINTS)]
    (line,) = drawn(draw_curves(rows, "long"), "p")
    assert len(line) <= 2 * (MAX_POINTS + 1)  # matplotlib may add a point at the edge


def test_a_run_without_rows_gives_a_picture() -> None:
    assert ElementTree.fromstring(draw_curves([], "nothing")).tag.endswith("svg")
