"""Prepares a phase: model, pack plan, loader, parameter groups and validator."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from timeviper_model.batching.prompt import check_tokenizer
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_model.config import TimeViperConfig, VisionConfig
from timeviper_model.layers.lora import LORA_A, LORA_B, add_lora
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.export_files import BASE_MODEL_KEY, public_name
from timeviper_model.weights.weights_folder import config_from_dict, config_to_dict
from timeviper_platform.common import storage
from timeviper_platform.data.encode.recipe import tower_facts
from timeviper_platform.data.store.compatibility import check_same_towers
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.loader import BatchLoader
from timeviper_platform.training.batches.packing import PackPlan
from timeviper_platform.training.batches.rows import SampleRows
from timeviper_platform.training.batches.samples import Reject, SampleBuilder
from timeviper_platform.training.batches.sizes import Measure, count_rejects, measure_samples
from timeviper_platform.training.batches.step_batches import BatchShape
from timeviper_platform.training.checkpoint.initial_weights import InitialWeights
from timeviper_platform.training.config import InitConfig, PhaseConfig, TrainConfig
from timeviper_platform.training.cost.flops import training_flops
from timeviper_platform.training.optim.parameter_groups import (
    ParameterGroup,
    describe_groups,
    resolve_groups,
    trained_share,
)
from timeviper_platform.training.validation.validator import Validator, build_validator

logger = logging.getLogger(__name__)

UNNAMED = "unnamed"
"""Default name of the second encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    name: str
    config: PhaseConfig
    model: TimeViper
    groups: list[ParameterGroup]
    plan: PackPlan
    loader: BatchLoader
    num_steps: int
    validator: Validator | None
    rejects: list[Reject]
    description: dict[str, Any]
    """Content of model.json."""


def prepare_phase(
    config: TrainConfig,
    name: str,
    model: TimeViper,
    store: FeatureStore,
    tokenizer: Any,
    *,
    rank: int,
    world_size: int,
    measure: Measure = measure_samples,
    initial: InitialWeights | None = None,
) -> Phase:
    """Prepares the phase `name`; weights of `model` may be loaded later.

    Args:
        initial: weights that the phase starts from, for model.json.

    Raises:
        ValueError: if data, model and configuration do not fit together.
    """
    phase = config.phases[name]
    check_phase(name, phase, model.config, tokenizer)
    builder = SampleBuilder(store, tokenizer, model.config.chat_template, phase.frames)
    rows = SampleRows.read(phase.samples)
    table = measure(rows, builder, max_tokens=phase.packing.max_tokens, max_frames=phase.packing.max_frames)
    plan = PackPlan(table, phase.packing, config.seed)
    num_steps = phase.steps or plan.num_steps(phase.packs_per_step, phase.epochs or 1)
    groups = phase_groups(model, phase)
    shape = _batch_shape(phase, model.config, tokenizer)
    loader = BatchLoader(
        plan,
        rows,
        builder,
        shape,
        rank=rank,
        world_size=world_size,
        pack_flops=partial(
            training_flops, model.config, use_transv=phase.use_transv, trained_share=trained_share(model, groups)
        ),
    )
    validator = build_validator(phase, builder, shape, measure, rank=rank, world_size=world_size)
    logger.info(
        "phase %s: %d samples, %d rejects %s, %d packs in the first epoch, %d steps of %d packs",
        *(name, len(table), len(table.rejects), count_rejects(table.rejects), plan.num_packs(0)),
        *(num_steps, phase.packs_per_step),
    )
    logger.info("phase %s: %s", name, describe_groups(groups, sum(p.numel() for p in model.parameters())))
    return Phase(
        name=name,
        config=phase,
        model=model,
        groups=groups,
        plan=plan,
        loader=loader,
        num_steps=num_steps,
        validator=validator,
        rejects=list(table.rejects),
        description={
            "config": config_to_dict(model.config),
            "tokenizer": config.tokenizer,
            "metadata": _metadata(config, name, store, has_temporal=rows.has_kind("temporal")),
            "lora_scale": None if phase.lora is None else phase.lora.scale,
            "initial": None if initial is None else initial._asdict(),
        },
    )


def check_phase(name: str, phase: PhaseConfig, model: TimeViperConfig, tokenizer: Any) -> None:
    """Raises ValueError if tokenizer, model and validation do not fit together."""
    _check_tokenizer(tokenizer, model)
    _check_can_answer(name, phase, model)


def build_standalone_validator(
    phase: PhaseConfig, model: TimeViperConfig, store: FeatureStore, tokenizer: Any
) -> Validator:
    builder = SampleBuilder(store, tokenizer, model.chat_template, phase.frames)
    shape = _batch_shape(phase, model, tokenizer)
    validator = build_validator(phase, builder, shape, measure_samples, rank=0, world_size=1)
    assert validator is not None
    return validator


def adapt(model: TimeViper, phase: PhaseConfig, seed: int) -> TimeViper:
    """Adds the phase's adapters in place, equally on every rank."""
    if phase.lora is not None:
        add_lora(model, phase.lora, torch.Generator().manual_seed(seed))
    return model


def phase_groups(model: TimeViper, phase: PhaseConfig) -> list[ParameterGroup]:
    """Raises ValueError if a rule matches no parameter, or no rule trains some adapters."""
    groups = resolve_groups(model, phase.trainable)
    trained = {name for group in groups for name in group.parameter_names}
    idle = [name for name, _ in model.named_parameters() if name.endswith((LORA_A, LORA_B)) and name not in trained]
    if idle:
        raise ValueError(
            f"{len(idle)} LoRA tensors such as {idle[0]} are trained by no rule; add match: '.*\\.lora_[AB]'"
        )
    return groups


def first_model(
    init: InitConfig, store: FeatureStore, encoder: str | None, second_encoder: str | None = None
) -> TimeViper:
    """Builds the model with a phase's initial weights.

    Raises:
        ValueError: if the store's features do not fit it, or the weights cannot be loaded.
    """
    return initial_weights(init).build(first_model_config(init, store, encoder, second_encoder))


def initial_weights(init: InitConfig) -> InitialWeights:
    return InitialWeights(init.weights, init.transv is not None, init.seed, init.backbone, init.revision)


def first_model_config(
    init: InitConfig, store: FeatureStore, encoder: str | None, second_encoder: str | None = None
) -> TimeViperConfig:
    if init.weights is None:
        config = init.model_config()
        return replace(config, vision=vision_of(store, config.vision, encoder, second_encoder))
    file = storage.join_uri(init.weights, "config.json")
    if not storage.exists(file):
        raise ValueError(f"{file} does not exist; name a weights folder that a phase or jobs/export.py has written")
    config = config_from_dict(storage.read_json(file), where=file)
    if init.preset is not None and config.text != init.model_config().text:
        raise ValueError(
            f"the weights {init.weights} have other sizes than the preset {init.preset!r}; remove init.preset"
        )
    check_same_towers(config.vision, store, init.weights)
    return init.changed(config)


def vision_of(
    store: FeatureStore, default: VisionConfig, encoder: str | None, second_encoder: str | None = None
) -> VisionConfig:
    """Returns the store's vision towers; `default` if the store does not describe the first.

    Raises:
        ValueError: if the features have another width than the projector.
    """
    first, second = tower_facts(store.recipe), None
    if "second" in store.recipe:
        second = VisionConfig(encoder=second_encoder or UNNAMED, **tower_facts(store.recipe["second"]))
    elif store.media_ids:
        first["hidden_size"] = store.info(store.media_ids[0]).dim
    vision = replace(default, **first, encoder=encoder or default.encoder, second=second)
    if vision.hidden_size != default.hidden_size:
        raise ValueError(
            f"features in {store.uri} have width {vision.hidden_size}, the model's projector takes"
            f" {default.hidden_size}; preprocess with the model's encoder, or train a model of that width"
        )
    return vision


def mean_kept_share(config: TimeViperConfig) -> float:
    """Returns the mean share of vision tokens that reach a block."""
    keep, shares = 1.0, []
    sites = {site.layer: site.keep for site in config.transv}
    for layer in range(config.text.num_hidden_layers):
        keep = min(keep, sites.get(layer, keep))
        shares.append(keep)
    return sum(shares) / len(shares)


def _batch_shape(phase: PhaseConfig, model: TimeViperConfig, tokenizer: Any) -> BatchShape:
    return BatchShape(
        packs_per_step=phase.packs_per_step,
        max_tokens=phase.packing.max_tokens,
        pad_to=phase.packing.max_tokens if phase.packing.pad_to_max_tokens else None,
        dim=model.vision.row_size,
        pad_token_id=int(tokenizer.pad_token_id or 0),
        num_epochs=phase.epochs,
        vision_cost=mean_kept_share(model) if phase.use_transv else 1.0,
    )


def _metadata(config: TrainConfig, name: str, store: FeatureStore, *, has_temporal: bool) -> dict[str, str]:
    """Metadata for serving and evaluation to reproduce the training inputs, and the origin of the weights."""
    phase, base = config.phases[name], _base_model(config, name)
    states_length = phase.frames.time_text != "temporal" or has_temporal
    return {
        **({} if base is None else {BASE_MODEL_KEY: base}),
        "run": config.name,
        "dtype": config.dtype,
        "recipe_hash": store.recipe_hash,
        "use_transv": str(phase.use_transv).lower(),
        **{name: str(value) for name, value in asdict(phase.frames).items()},
        "time_text": phase.frames.time_text if states_length else "never",
    }


def _base_model(config: TrainConfig, name: str) -> str | None:
    """Returns the language model that the weights before `name` started from."""
    names = list(config.phases)
    inits = [config.phases[each].init for each in names[: names.index(name) + 1]]
    init = next(each for each in reversed(inits) if each is not None)
    if init.weights is None:
        return None if init.backbone is None else public_name(init.backbone)
    file = storage.join_uri(init.weights, "config.json")
    metadata = storage.read_json(file).get("timeviper_metadata", {}) if storage.exists(file) else {}
    return str(metadata[BASE_MODEL_KEY]) if BASE_MODEL_KEY in metadata else None


def _check_tokenizer(tokenizer: Any, config: TimeViperConfig) -> None:
    if len(tokenizer) > config.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, the model {config.text.vocab_size} embeddings;"
            " they belong to different models"
        )
    check_tokenizer(tokenizer, chat_template(config.chat_template, tokenizer))


def _check_can_answer(name: str, phase: PhaseConfig, model: TimeViperConfig) -> None:
    """Generation always runs the TransV sites."""
    if phase.validation is not None and phase.validation.num_answers and model.transv and not phase.use_transv:
        raise ValueError(
            f"phases.{name}.validation.num_answers: generation runs the model's TransV sites, and"
            f" {phase.use_transv = }; set num_answers: 0 in this phase, or use_transv: true"
        )
