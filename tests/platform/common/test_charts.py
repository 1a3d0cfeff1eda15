from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from timeviper_platform.common.charts import (
    Example,
    FileFormat,
    Panel,
    Part,
    examples_picture,
    heat_map,
    line_chart,
    value_grid,
)

PANEL = Panel({"a & b": [(0, 0.0), (10, 2.0)], "c": [(0, 1.0), (10, 1.0)]}, "y", dots={"c": [(5, 1.5)]})


def coordinates(svg: bytes, name: str) -> list[tuple[float, float]]:
    """Points of a line in the picture; y grows downwards."""
    (path,) = ElementTree.fromstring(svg).findall(f".//{{*}}g[@id='{name}']/{{*}}path")
    numbers = [float(word) for word in path.attrib["d"].split() if word not in "ML"]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_a_line_runs_to_the_right_and_up() -> None:
    (x0, y0), (x1, y1) = coordinates(line_chart([PANEL], title="t", x_label="x"), "a & b")
    assert x0 < x1
    assert y0 > y1


def test_titles_labels_and_names_are_text() -> None:
    svg = line_chart([PANEL, PANEL], title="loss < 1", x_label="step").decode()
    assert "loss &lt; 1" in svg
    assert svg.count(">y<") == 2
    assert svg.count(">step<") == svg.count(">a &amp; b<") == 1  # one legend entry for both panels


def test_a_name_has_one_colour_in_all_panels() -> None:
    svg = line_chart([PANEL, Panel({"c": [(0, 1.0), (1, 2.0)]})], title="t", x_label="x")
    root = ElementTree.fromstring(svg)
    styles = [path.attrib["style"] for path in root.findall(".//{*}g[@id='c']/{*}path")]
    assert len(styles) == 2
    assert len(set(styles)) == 1


def test_a_heat_map_names_its_axes_colours_and_wide_parts() -> None:
    parts = [Part("system", 0.01), Part("vision", 0.8), Part("instruction", 1.0)]
    labels = {"x_label": "read", "y_label": "query", "colour_label": "share"}
    svg = heat_map([[1.0, 0.1], [0.0, 1.0]], title="t", parts=parts, **labels).decode()  # type: ignore[arg-type]
    for text in ("read", "query", "share", "vision", "instruction"):
        assert svg.count(f">{text}<") == 1, text
    assert ">system<" not in svg  # a hundredth of the width would be covered by the next name


def test_levels_are_dashed_and_named() -> None:
    svg = line_chart([Panel({"a": [(0, 1.0)]}, levels={"as trained": 0.5})], title="t", x_label="x")
    (path,) = ElementTree.fromstring(svg).findall(".//{*}g[@id='as trained']/{*}path")
    assert "stroke-dasharray" in path.attrib["style"]
    assert svg.decode().count(">as trained<") == 1


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def test_larger_values_of_a_heat_map_are_darker() -> None:
    def darkest(value: float) -> int:
        picture = pixels(heat_map([[value, 0.0], [0.0, 1.0]], title="t", file_format="png"))
        height, width = picture.shape
        return int(picture[height // 3, width // 3])

    assert darkest(0.0) == 255 > darkest(0.001) > darkest(0.1) > darkest(1.0)


@pytest.mark.parametrize("file_format", ["svg", "png"])
def test_equal_inputs_give_equal_bytes(file_format: FileFormat) -> None:
    assert len({line_chart([PANEL], title="t", x_label="x", file_format=file_format) for _ in range(2)}) == 1
    assert len({heat_map([[1.0, 0.1]], title="t", file_format=file_format) for _ in range(2)}) == 1


def test_columns_have_their_own_x_axis_and_title() -> None:
    panels = [Panel({"a": [(0, 1.0), (x, 2.0)]}, title=f"to {x}") for x in (5, 60)]
    svg = line_chart(panels, title="t", x_label="block", num_columns=2).decode()
    assert svg.count(">block<") == 2
    assert ">to 5<" in svg


def test_a_band_lies_around_its_line() -> None:
    panel = Panel({"a": [(0, 1.0), (1, 2.0)]}, bands={"a": [(0, 0.5, 1.5), (1, 1.5, 2.5)]})
    assert b"FillBetweenPolyCollection" in line_chart([panel], title="t", x_label="x")


def test_cells_of_a_grid_show_their_values() -> None:
    svg = value_grid([[0.0, 0.25], [1.0, None]], x_names=["a", "b"], y_names=["c", "d"], title="t").decode()
    assert all(svg.count(f">{text}<") == 1 for text in ("0.25", "c", "b"))
    assert "nan" not in svg


def test_examples_show_frames_and_text() -> None:
    frame = np.zeros((8, 8, 3), dtype=np.uint8)
    shown = [
        Example("choice", [frame, frame], [0.5, 2.0], ["Which?", "red"]),
        Example("caption", [], [], ["no frames"]),
    ]
    svg = examples_picture(shown, title="answers").decode()
    assert svg.count("<image") == 2
    assert all(f">{text}<" in svg for text in ("choice", "0.5 s", "2 s", "Which?", "no frames"))
