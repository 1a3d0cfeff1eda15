"""The demo without its long steps."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from timeviper_platform.cli.demo import Demo, is_right, main, write_manifest_with_film
from timeviper_platform.common.schemas import MANIFEST
from timeviper_platform.data.inputs.readers import read_pages


def test_a_film_is_added_to_the_media_of_the_corpus(tmp_path: Path) -> None:
    corpus = tmp_path / "demo" / "corpus"
    corpus.mkdir(parents=True)
    film = tmp_path / "films" / "night.mp4"
    film.parent.mkdir()
    film.touch()  # never opened
    row = dict.fromkeys(MANIFEST.names) | {"uri": "videos/a.mp4", "media_id": "a"}
    pq.write_table(pa.Table.from_pylist([row], schema=MANIFEST), corpus / "manifest.parquet")

    configured = Demo(folder=tmp_path / "demo", film=film, quick=True)
    write_manifest_with_film(configured, film)
    (override,) = [value for value in configured.overrides("preprocess") if value.startswith("input=")]
    (media,) = read_pages(override.removeprefix("input="))
    assert [(item.media_id, item.uri) for item in media] == [
        ("a", str(corpus / "videos" / "a.mp4")),
        ("night", str(film)),
    ]


def test_a_missing_film_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--film", str(tmp_path / "nowhere.mp4")]) == 2
    assert "nowhere.mp4" in capsys.readouterr().err


def test_features_runs_and_weights_of_no_demo_are_not_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "runs" / "first" / "report.json"
    own.parent.mkdir(parents=True)
    own.touch()
    assert main(["--folder", str(tmp_path), "--until", "corpus", "--quick"]) == 1
    assert (
        "runs holds files that were not generated, and could be deleted; name a new folder" in capsys.readouterr().err
    )
    assert own.exists()


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("red circle", "red circle", True),
        (" red circle\n", "red circle", True),
        ("red circle or blue square", "red circle", False),
        ("From 4 to 9 seconds.", "From 4 to 10 seconds.", True),
        ("From 8 to 14 seconds.", "From 4 to 10 seconds.", False),
        ("red circle", "From 4 to 10 seconds.", False),
    ],
)
def test_an_answer_is_right_if_equal_or_overlapping_half_the_interval(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected) is right
