"""Runs that end before their last step, on one rank in this process."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.bare_training import train_bare
from reference.training_corpus import (
    DIM,
    NUM_TOKENS_PER_FRAME,
    RECIPE,
    Corpus,
    make_corpus,
    sample_row,
    train_values,
    write_samples,
)
from timeviper_model.weights.weights_folder import from_pretrained, load_tokenizer, save_pretrained
from timeviper_platform.common import storage
from timeviper_platform.common.config import parse_config
from timeviper_platform.data.store import row_groups
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.checkpoint.manager import Checkpoints, resolve_resume
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.hooks import RunHooks
from timeviper_platform.training.interrupts import (
    FatalTrainingError,
    Interrupt,
    StoppedError,
    out_of_memory_advice,
    sigterm_interrupts,
)
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.phase import Phase, first_model, prepare_phase
from timeviper_platform.training.run import RunFolder, run_training
from timeviper_platform.training.step import describe_non_finite

pytestmark = pytest.mark.usefixtures("group_of_one")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def damaged_features(corpus: Corpus) -> str:
    """The corpus' store, with a single non-finite number in one video."""
    good = FeatureStore.open(corpus.features)
    media = {media_id: good.read(media_id).features.float() for media_id in good.media_ids}
    media["video-2"][1, 2, 3] = torch.nan
    write_store(str(corpus.folder / "damaged"), media, recipe=RECIPE)
    assert media["video-2"].shape[1:] == (NUM_TOKENS_PER_FRAME, DIM)
    return str(corpus.folder / "damaged")


def one_phase(corpus: Corpus, name: str, **changes: object) -> TrainConfig:
    values = train_values(corpus, name=name, checkpoint={"every_steps": 3, "keep": 9}, **changes)
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": 8}
    return parse_config(TrainConfig, values)


def prepared(config: TrainConfig, *, rank: int = 0, world_size: int = 1) -> Phase:
    store = FeatureStore.open(config.feature_store)
    init = config.phases["instruct"].init
    assert init is not None
    model = first_model(init, store, None)
    tokenizer = load_tokenizer(config.tokenizer)
    return prepare_phase(config, "instruct", model, store, tokenizer, rank=rank, world_size=world_size)


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in read_metrics(RunFolder.of(config).uri)]


def test_a_non_finite_loss_names_its_step_and_pack_and_keeps_the_last_good_checkpoint(corpus: Corpus) -> None:
    rows = [sample_row(n, [], [("user", "What is this?"), ("assistant", "a blue square" + " " * n)]) for n in range(24)]
    rows[17]["conversation"][1]["text"] = "~"  # a token that occurs nowhere else
    write_samples(corpus.folder / "poisoned.parquet", rows)
    config = one_phase(corpus, "poisoned")
    phase = prepared(config)
    token = load_tokenizer(corpus.tokenizer)("~", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        phase.model.backbone.embeddings.weight[token] = torch.nan
    save_pretrained(phase.model, corpus.folder / "poison", tokenizer=load_tokenizer(corpus.tokenizer))
    values = train_values(corpus, name="poisoned", checkpoint={"every_steps": 1, "keep": 99})
    del values["phases"]["align"], values["phases"]["instruct"]["steps"]
    values["phases"]["instruct"] |= {
        "epochs": 1,
        "init": {"weights": str(corpus.folder / "poison")},
        "samples": [{"uri": str(corpus.folder / "poisoned.parquet")}],
        "packs_per_step": 1,
        "trainable": [{"match": r"(backbone\.layers|lm_head)\..*", "lr": 1e-3}],
    }
    config = parse_config(TrainConfig, values)
    with pytest.raises(FatalTrainingError, match=r"loss is nan .* at step (\d+), in pack 0 \(.*sample-0017") as raised:
        train_local(config)
    failed = int(str(raised.value).split("at step ")[1].split(",")[0])
    newest = Checkpoints(RunFolder.of(config).checkpoints).newest()
    assert len(losses(config)) == failed - 1
    assert newest is None if failed == 1 else newest is not None and newest.endswith(f"{failed - 1:08d}")


def test_non_finite_gradients_with_finite_losses_name_every_pack_of_the_step(corpus: Corpus) -> None:
    batches = next(iter(prepared(one_phase(corpus, "overflow")).loader.steps(PackPosition(0, 0), 0, 1)))
    message = describe_non_finite(batches, 2.5, math.nan, torch.ones(len(batches.micro_batches)))
    assert "the loss of every pack is finite: a backward pass overflowed in pack 0 (samples sample-0" in message
    assert all(name in message for item in batches.micro_batches for name in item.sample_ids)


def test_each_row_has_the_epoch_of_its_packs(corpus: Corpus) -> None:
    values = train_values(corpus, name="one-epoch")
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": None, "epochs": 1, "packs_per_step": 9}
    config = parse_config(TrainConfig, values)
    train_local(config)
    assert {row["epoch"] for row in read_metrics(RunFolder.of(config).uri)} == {0}


def test_a_sample_with_damaged_features_is_left_out_and_counted(corpus: Corpus, damaged_features: str) -> None:
    config = one_phase(corpus, "damaged", feature_store=damaged_features)
    report = train_local(config)
    rows = read_metrics(RunFolder.of(config).uri)
    num_damaged = sum(row["num_damaged_samples"] for row in rows)
    assert num_damaged > 0
    assert report["instruct"]["rejects"]["damaged_features"] == num_damaged
    # the bare loop divides by the remaining labels
    assert losses(config) == pytest.approx(train_bare(prepared(config), config.zero), rel=2e-6)


def test_any_number_of_ranks_drops_the_same_samples_without_substitutes(corpus: Corpus, damaged_features: str) -> None:
    def seen(features: str, world_size: int) -> tuple[list[set[str]], list[set[str]]]:
        """(used samples, dropped samples) of each step over all ranks."""
        used: list[set[str]] = [set() for _ in range(8)]
        lost: list[set[str]] = [set() for _ in range(8)]
        config = one_phase(corpus, "seen", feature_store=features)
        for rank in range(world_size):
            loader = prepared(config, rank=rank, world_size=world_size).loader
            for number, batches in enumerate(loader.steps(PackPosition(0, 0), 0, 8)):
                used[number] |= {name for item in batches.micro_batches for name in item.sample_ids}
                lost[number] |= {item.sample_id for item in batches.damaged}
        return used, lost

    whole, _ = seen(corpus.features, 1)
    used, lost = seen(damaged_features, 1)
    assert any(lost)
    assert [here | gone for here, gone in zip(used, lost, strict=True)] == whole
    assert seen(damaged_features, 2) == (used, lost)
    assert seen(damaged_features, 3) == (used, lost)


def test_the_count_of_damaged_samples_survives_a_restart_and_ends_the_run_at_the_limit(
    corpus: Corpus, damaged_features: str
) -> None:
    loader = prepared(one_phase(corpus, "limit", feature_store=damaged_features)).loader
    counts = [len(step.damaged) for step in loader.steps(PackPosition(0, 0), 0, 8)]
    first, second = [number for number, count in enumerate(counts) if count][:2]  # zero-based steps that lose samples
    values = train_values(
        corpus, name="limit", feature_store=damaged_features, checkpoint={"every_steps": 1, "keep": 9}
    )
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": 8}
    config = parse_config(TrainConfig, values | {"loader": {"max_damaged_samples": counts[first]}})
    total = counts[first] + counts[second]
    for _ in range(2):  # the second run starts after the first loss
        with pytest.raises(FatalTrainingError, match=rf"{total} samples of phase instruct .* up to step {second + 1}"):
            train_local(config)
        assert len(losses(config)) == second > first


def test_a_missing_store_file_ends_the_run(corpus: Corpus) -> None:
    store = str(corpus.folder / "gone")
    good = FeatureStore.open(corpus.features)
    write_store(store, {media_id: good.read(media_id).features for media_id in good.media_ids}, recipe=RECIPE)
    config = one_phase(corpus, "gone", feature_store=store, loader={"max_damaged_samples": 2})
    for file in Path(store, "data").iterdir():
        file.unlink()
    with pytest.raises(FatalTrainingError, match="jobs/preprocess"):
        train_local(config)


def flaky_features(monkeypatch: pytest.MonkeyPatch, num_timeouts: int) -> None:
    """Makes the first reads of a data file time out."""
    opened, failures = row_groups.open_data_file, iter([TimeoutError("the store does not answer")] * num_timeouts)

    class Flaky:
        def __init__(self, file: Any) -> None:
            self._file = file

        def read_row_groups(self, *args: Any, **keywords: Any) -> Any:
            if (failure := next(failures, None)) is not None:
                raise failure
            return self._file.read_row_groups(*args, **keywords)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr(row_groups, "open_data_file", lambda uri: Flaky(opened(uri)))


def test_a_short_storage_outage_costs_no_sample(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky_features(monkeypatch, storage.MAX_ATTEMPTS - 1)
    loader = prepared(one_phase(corpus, "flaky")).loader
    assert not any(step.damaged for step in loader.steps(PackPosition(0, 0), 0, 8))


def test_a_long_storage_outage_ends_the_run_and_drops_no_sample(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = one_phase(corpus, "unreachable")
    with monkeypatch.context() as patch:
        flaky_features(patch, storage.MAX_ATTEMPTS)
        with pytest.raises(storage.StorageUnavailableError, match="is the storage up"):
            train_local(config)
    assert train_local(config)["instruct"]["rejects"].get("damaged_features") is None


def test_out_of_memory_errors_list_the_settings_to_change() -> None:
    with pytest.raises(RuntimeError, match=r"out of memory at step = 7, with a pack of 900 tokens: lower packing") as e:
        with out_of_memory_advice(rank=0, step=7, largest_pack=900):
            torch.empty(2**60, dtype=torch.uint8)
    assert "activation_checkpointing: true" in str(e.value)
    with pytest.raises(RuntimeError, match=r"^something else$"), out_of_memory_advice(rank=0, step=7, largest_pack=900):
        raise RuntimeError("something else")


def test_a_stopped_run_saves_and_resumes_later(corpus: Corpus) -> None:
    whole = one_phase(corpus, "whole")
    train_local(whole)
    config = one_phase(corpus, "stopped")
    interrupts = iter([Interrupt.NONE] * 4 + [Interrupt.STOP])
    with pytest.raises(StoppedError, match=r"after step 4 of phase instruct; start it again to resume from .*00000004"):
        run_training(config, resume_from=None, device=CPU, hooks=RunHooks(interrupts=lambda: next(interrupts)))
    newest = resolve_resume(RunFolder.of(config).checkpoints, "auto")
    assert newest is not None
    assert newest.endswith("step-00000004")
    train_local(config)
    assert losses(config) == losses(whole)


def test_a_save_request_makes_one_checkpoint_and_training_continues(corpus: Corpus) -> None:
    config = one_phase(corpus, "saved")
    interrupts = iter([Interrupt.NONE, Interrupt.SAVE, *[Interrupt.NONE] * 6])
    reported: list[str] = []
    run_training(
        config,
        resume_from=None,
        device=CPU,
        hooks=RunHooks(
            interrupts=lambda: next(interrupts),
            on_checkpoint=lambda uri, row: reported.append(f"{uri[-1]} {row['step']}"),
        ),
    )
    assert reported == ["1 1", "3 3", "6 6", "8 8"]


def test_sigterm_requests_a_stop() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_interrupts() as interrupts:
        assert interrupts() is Interrupt.NONE
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts() is Interrupt.STOP
    assert signal.getsignal(signal.SIGTERM) is before


def test_weights_of_a_stopped_run_are_not_exported(corpus: Corpus) -> None:
    config = one_phase(corpus, "unfinished")
    interrupts = iter([Interrupt.NONE, Interrupt.STOP])
    with pytest.raises(StoppedError):
        run_training(config, resume_from=None, device=CPU, hooks=RunHooks(interrupts=lambda: next(interrupts)))
    with pytest.raises(ValueError, match="there is no folder"):
        from_pretrained(RunFolder.of(config).weights("instruct"))
