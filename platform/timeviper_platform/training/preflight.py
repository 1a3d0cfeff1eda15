"""Finds mistakes in a configuration on the driver, before the run waits for resources."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from timeviper_model.config import TimeViperConfig
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import TOKENIZER_FILES, config_from_dict, load_tokenizer
from timeviper_platform.common import schemas, storage
from timeviper_platform.common.cluster_checks import check_cluster_can_give
from timeviper_platform.common.machine_cache import local_copy
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.rows import source_files
from timeviper_platform.training.batches.samples import Reject, SampleBuilder
from timeviper_platform.training.batches.sizes import count_rejects, within_caps
from timeviper_platform.training.checkpoint.manager import read_model, read_state
from timeviper_platform.training.config import PhaseConfig, TrainConfig
from timeviper_platform.training.phase import adapt, check_phase, first_model_config, phase_groups

logger = logging.getLogger(__name__)

MAX_SEARCH_S = 20.0
"""Seconds to look for a usable sample."""
BATCH_ROWS = 256


def check_inputs(config: TrainConfig, start: str | None) -> None:
    """Checks store, tokenizer, samples, sizes and parameter groups of all phases that will run.

    Reads samples until one is usable, and no weights.

    Args:
        start: checkpoint that the run will resume from.

    Raises:
        ValueError: for a mistake that every attempt would repeat.
    """
    if config.backend == "kernels" and not config.workers.use_gpu:
        raise ValueError("backend: kernels needs workers.use_gpu: true; set backend: auto for the CPU")
    store = FeatureStore.open(config.feature_store)
    tokenizer = load_tokenizer_or_fail(config.tokenizer)
    names, model = list(config.phases), None
    if start is not None:
        phase = read_state(start).phase
        names = names[names.index(phase) :] if phase in names else []
        model = config_from_dict(read_model(start)["config"], where=start)
    for number, name in enumerate(names):
        phase_config = config.phases[name]
        is_resumed = start is not None and number == 0
        if phase_config.init is not None and not is_resumed:
            model = first_model_config(phase_config.init, store, config.encoder, config.second_encoder)
        assert model is not None  # TrainConfig: the first phase has an init
        check_phase(name, phase_config, model, tokenizer)
        with torch.device("meta"):
            phase_groups(adapt(TimeViper(model), phase_config, config.seed), phase_config)
        _check_samples(name, phase_config, model, store, tokenizer)


def load_tokenizer_or_fail(name: str) -> Any:
    """Raises ValueError if it cannot be loaded."""
    try:
        return load_tokenizer(local_copy(name, TOKENIZER_FILES))
    except (OSError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"tokenizer: {name!r} cannot be loaded; set a folder or a Hugging Face name ({first})"
        ) from error


def check_resources(config: TrainConfig) -> None:
    """Refuses workers that no node can ever hold; warns if the run will wait for nodes. Needs a connected Ray.

    Raises:
        ValueError: if no node is large enough for a worker, and none can be added.
    """
    import ray

    workers = config.workers
    needed = {"CPU": 1.0, **workers.resources_per_worker, **({"GPU": 1.0} if workers.use_gpu else {})}
    check_cluster_can_give(
        needed,
        wanted_by="each worker (workers.use_gpu, workers.resources_per_worker)",
        way_out="set workers.use_gpu: false, lower workers.resources_per_worker, or start Ray on larger machines",
    )
    total = ray.cluster_resources()
    lacking = [
        f"{total.get(name, 0.0):g} of {amount * workers.min_workers:g} {name}"
        for name, amount in needed.items()
        if total.get(name, 0.0) < amount * workers.min_workers
    ]
    if lacking:
        logger.warning("the cluster has %s; the run waits until nodes are added", ", ".join(lacking))


def storage_inputs(config: TrainConfig) -> dict[str, str]:
    """Returns what every node must see, by configuration key; names on a hub are left out."""
    found = {"feature_store": config.feature_store}
    for name, phase in config.phases.items():
        validation = () if phase.validation is None else phase.validation.samples
        for key, sources in (("samples", phase.samples), ("validation.samples", validation)):
            found |= {f"phases.{name}.{key}.{number}": source.uri for number, source in enumerate(sources)}
        if phase.init is not None and phase.init.weights is not None:
            found[f"phases.{name}.init.weights"] = phase.init.weights
        if phase.init is not None and phase.init.backbone is not None:
            found[f"phases.{name}.init.backbone"] = phase.init.backbone
    found["tokenizer"] = config.tokenizer
    return {key: uri for key, uri in found.items() if not storage.is_local(uri) or Path(uri).is_absolute()}


def _check_samples(name: str, phase: PhaseConfig, model: TimeViperConfig, store: FeatureStore, tokenizer: Any) -> None:
    """Looks for one usable sample."""
    builder = SampleBuilder(store, tokenizer, model.chat_template, phase.frames)
    validation = () if phase.validation is None else phase.validation.samples
    for key, sources in (("samples", phase.samples), ("validation.samples", validation)):
        rejects: list[Reject] = []
        deadline = time.monotonic() + MAX_SEARCH_S
        files = [file for source in sources for file in source_files(source.uri)]
        for row in (row for file in files for row in _rows(file)):
            item = builder.build(row)
            if not isinstance(item, Reject):
                item = within_caps(row["sample_id"], item, phase.packing.max_tokens, phase.packing.max_frames)
            if not isinstance(item, Reject):
                break
            rejects.append(item)
            if time.monotonic() > deadline:
                raise ValueError(_none_usable(name, key, rejects, "the first "))
        else:
            if files:
                raise ValueError(_none_usable(name, key, rejects, ""))


def _none_usable(phase: str, key: str, rejects: Sequence[Reject], first: str) -> str:
    if not rejects:
        return f"phases.{phase}.{key}: the samples hold no rows"
    return (
        f"phases.{phase}.{key}: none of {first}{len(rejects)} samples can be used: {count_rejects(rejects)};"
        f" for example {rejects[0].sample_id}: {rejects[0].detail}"
    )


def _rows(uri: str) -> Iterator[dict[str, Any]]:
    with storage.open_file(uri) as file:
        try:
            parquet = pq.ParquetFile(file)
        except ValueError as error:
            raise ValueError(f"{uri} is not a Parquet file: {error}") from error
        schemas.check_version(parquet.schema_arrow, schemas.SAMPLES, source=uri)
        for batch in parquet.iter_batches(BATCH_ROWS, columns=schemas.SAMPLES.names):
            yield from batch.to_pylist()
