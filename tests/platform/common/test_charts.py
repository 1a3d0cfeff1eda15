from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from timeviper_platform.common.charts import FileFormat, Panel, heat_map, line_chart

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
    assert svg.count(">a &amp; b<") == svg.count(">y<") == 2
    assert svg.count(">step<") == 1


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def test_larger_values_of_a_heat_map_are_darker() -> None:
    def darkest(value: float) -> int:
        empty = [[0.0, 0.0], [0.0, 0.0]]
        with_value = [[value, 0.0], [0.0, 1.0]]
        picture = pixels(heat_map(with_value, title="t", file_format="png"))
        height, width = picture.shape
        assert picture.shape == pixels(heat_map(empty, title="t", file_format="png")).shape
        return int(picture[height // 4, width // 4])

    assert darkest(0.0) == 255 > darkest(0.001) > darkest(0.1) > darkest(1.0)


@pytest.mark.parametrize("file_format", ["svg", "png"])
def test_equal_inputs_give_equal_bytes(file_format: FileFormat) -> None:
    assert len({line_chart([PANEL], title="t", x_label="x", file_format=file_format) for _ in range(2)}) == 1
    assert len({heat_map([[1.0, 0.1]], title="t", file_format=file_format) for _ in range(2)}) == 1
