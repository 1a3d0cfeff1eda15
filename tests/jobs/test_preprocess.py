"""`jobs/preprocess.py`: exit codes, output and error messages."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from reference.synthetic_media import make_encoder, make_video
from timeviper_platform.data.store.reader import FeatureStore

ROOT = Path(__file__).resolve().parents[2]


def run_job(*arguments: str) -> int:
    main = runpy.run_path(str(ROOT / "jobs" / "preprocess.py"))["main"]
    return int(main(list(arguments)))


def tiny(corpus: Path, *overrides: str) -> list[str]:
    return [
        "--config",
        str(ROOT / "ray_configs" / "tiny" / "preprocess.yaml"),
        f"input={corpus}",
        f"feature_store={corpus / 'features'}",
        f"encoder.model={corpus / 'encoder'}",
        *overrides,
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    make_encoder(tmp_path / "encoder")
    make_video(tmp_path / "clip.mp4", range(24))
    return tmp_path


def test_a_dry_run_prints_the_plan(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(*tiny(corpus), "--dry-run") == 0
    output = capsys.readouterr().out
    assert "segments   1 planned, 1 to do" in output
    assert "frames     3 to do" in output
    assert not (corpus / "features").exists()


def test_an_input_of_broken_files_succeeds_and_counts_them(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "text.mp4").write_text("text")
    assert run_job(*tiny(corpus, f"input={corpus / 'text.mp4'}")) == 0  # nothing to encode, so Ray is not started
    assert (
        "media      1 planned = 0 ok + 0 partial + 1 rejected; reasons: 1 unknown_format (probe)"
        in capsys.readouterr().out
    )
    assert list(FeatureStore.open(str(corpus / "features")).media_ids) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "execution.num_wrokers=2",
            "unknown key 'execution.num_wrokers' (did you mean 'num_workers'?); the keys here are mode, num_workers",
        ),
        ("input=/nowhere/manifest.parquet", "no manifest at '/nowhere/manifest.parquet'"),
        ("feature_store=/proc/version/features", "cannot write /proc/version/features"),
        ("encoder.model=/nowhere/encoder", "there is no folder '/nowhere/encoder'"),
        ("sampling.fps=0", "fps = 0"),
        ("execution.mode=sideways", "execution.mode"),
    ],
)
def test_a_user_error_ends_the_job_with_its_reason(
    corpus: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert run_job(*tiny(corpus, override)) == 1
    assert message in capsys.readouterr().err


def test_both_configurations_load_and_have_the_same_keys() -> None:
    import yaml

    from timeviper_platform.common.config import load_config
    from timeviper_platform.data.preprocess.config import PreprocessConfig

    def keys(values: dict[str, object], path: str = "") -> set[str]:
        nested = [keys(v, f"{path}{k}.") if isinstance(v, dict) else {f"{path}{k}"} for k, v in values.items()]
        return set().union(*nested)

    files = [ROOT / "ray_configs" / name for name in ("preprocess.yaml", "tiny/preprocess.yaml")]
    assert load_config(PreprocessConfig, files[0]).encoder.model == "google/siglip-so400m-patch14-384"
    assert load_config(PreprocessConfig, files[1]).feature_store == "outputs/demo/features"
    assert keys(yaml.safe_load(files[0].read_text())) == keys(yaml.safe_load(files[1].read_text()))
