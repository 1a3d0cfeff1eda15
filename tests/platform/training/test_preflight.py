"""Mistakes that end a run on the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from reference.training_corpus import Corpus, make_corpus, sample_row, train_values, write_samples
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.common import cluster_checks
from timeviper_platform.common.config import parse_config
from timeviper_platform.training import preflight
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.preflight import check_inputs, check_resources, storage_inputs
from timeviper_platform.training.ray_trainer import train_on_ray


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    turns = [("user", "What is this?"), ("assistant", "a blue square")]
    write_samples(
        corpus.folder / "strangers.parquet", [sample_row(n, [("no-film", None, None)], turns) for n in range(9)]
    )
    write_samples(corpus.folder / "empty.parquet", [])
    (corpus.folder / "text.parquet").write_text("not Parquet")
    tokenizer = load_tokenizer(corpus.tokenizer)
    tokenizer.add_tokens([f"<{number}>" for number in range(400)])
    tokenizer.save_pretrained(corpus.folder / "large-tokenizer")
    return corpus


def config_with(corpus: Corpus, **changes: Any) -> TrainConfig:
    values = train_values(corpus)
    for key, value in changes.items():
        node: Any = values
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return parse_config(TrainConfig, values)


def test_a_good_configuration_passes_and_reads_few_samples(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    build = preflight.SampleBuilder.build

    def note(builder: Any, row: dict[str, Any]) -> Any:
        built.append(row["sample_id"])
        return build(builder, row)

    monkeypatch.setattr(preflight.SampleBuilder, "build", note)
    check_inputs(config_with(corpus), None)
    assert 2 <= len(built) < 10


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("feature_store", "/nowhere", "no feature store at '/nowhere'"),
        ("tokenizer", "/nowhere", "tokenizer: '/nowhere' cannot be loaded; set a folder or a Hugging Face name"),
        ("tokenizer", "large-tokenizer", "embeddings; they belong to different models"),
        ("phases__instruct__samples", [{"uri": "/nowhere.parquet"}], "there are no samples at '/nowhere.parquet'"),
        ("phases__instruct__samples", [{"uri": "empty.parquet"}], "phases.instruct.samples: the samples hold no rows"),
        ("phases__instruct__samples", [{"uri": "text.parquet"}], "text.parquet is not a Parquet file"),
        (
            "phases__instruct__samples",
            [{"uri": "strangers.parquet"}],
            r"phases.instruct.samples: none of 9 samples can be used: \{'no_features': 9\}; for example sample-0000",
        ),
        ("phases__align__packing", {"max_tokens": 2}, r"none of 24 samples can be used: \{'too_long': 24\}"),
        ("phases__instruct__trainable", [{"match": "nothing", "lr": 1e-3}], "'nothing' matches no parameter"),
        ("phases__align__init", {"weights": "/nowhere"}, "config.json does not exist"),
        ("backend", "kernels", "backend: kernels needs workers.use_gpu: true"),
    ],
)
def test_mistakes_are_found_without_weights_or_workers(corpus: Corpus, key: str, value: Any, message: str) -> None:
    if isinstance(value, list) and "uri" in value[0] and not value[0]["uri"].startswith("/"):
        value = [{"uri": str(corpus.folder / value[0]["uri"])}]
    if value == "large-tokenizer":
        value = str(corpus.folder / value)
    with pytest.raises(ValueError, match=message):
        check_inputs(config_with(corpus, **{key: value}), None)


def test_the_search_for_a_usable_sample_ends(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MAX_SEARCH_S", -1.0)
    samples = [{"uri": str(corpus.folder / "strangers.parquet")}]
    with pytest.raises(ValueError, match="none of the first 1 samples can be used"):
        check_inputs(config_with(corpus, phases__align__samples=samples), None)


def test_a_worker_that_no_node_can_hold_is_a_mistake_and_too_few_nodes_are_waited_for(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, two nodes of one GPU passed for a worker that needs two, and the run waited for ever."""
    nodes = [{"Resources": {"CPU": 8.0, "GPU": 1.0}}, {"Resources": {"CPU": 8.0, "GPU": 1.0}}]
    monkeypatch.setattr(cluster_checks, "working_nodes", lambda: nodes)
    monkeypatch.setattr(cluster_checks, "largest_node_types", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    workers = {"use_gpu": True, "num_workers": [4, 8]}
    check_resources(config_with(corpus, workers=workers))
    assert caplog.messages == ["the cluster has 2 of 4 GPU; the run waits until nodes are added"]
    with pytest.raises(ValueError, match=r"12 CPUs wanted by each worker .*, largest node has 8, .*use_gpu"):
        check_resources(config_with(corpus, workers=workers | {"resources_per_worker": {"CPU": 12}}))
    del nodes[0]["Resources"]["GPU"], nodes[1]["Resources"]["GPU"]
    with pytest.raises(ValueError, match=r"1 GPU wanted by each worker .*, largest node has 0"):
        check_resources(config_with(corpus, workers=workers))


def test_a_submitted_run_into_a_relative_folder_is_refused(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, it succeeded into a folder that Ray deletes."""
    monkeypatch.setenv(cluster_checks.SUBMITTED_VARIABLE, "{}")
    with pytest.raises(ValueError, match=r"runs = 'outputs/runs' lies in the working folder of a submitted job"):
        train_on_ray(config_with(corpus, runs="outputs/runs"))


def test_every_node_must_see_all_inputs_but_names_on_a_hub(corpus: Corpus) -> None:
    config = config_with(corpus, tokenizer="owner/name", phases__align__init={"weights": "s3://bucket/weights"})
    assert storage_inputs(config) == {
        "feature_store": corpus.features,
        "phases.align.samples.0": corpus.samples,
        "phases.align.init.weights": "s3://bucket/weights",
        "phases.instruct.samples.0": corpus.samples,
    }


def test_a_resumed_run_needs_no_initial_weights(corpus: Corpus, tmp_path: Path, group_of_one: None) -> None:
    from timeviper_platform.training.checkpoint.manager import Checkpoints
    from timeviper_platform.training.local import train_local
    from timeviper_platform.training.run import RunFolder

    config = config_with(corpus, name="resumed", phases__align__steps=1, phases__instruct__steps=1)
    train_local(config)
    newest = Checkpoints(RunFolder.of(config).checkpoints).newest()
    check_inputs(config_with(corpus, name="resumed", phases__align__init={"weights": "/nowhere"}), newest)
