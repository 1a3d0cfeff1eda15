"""Reports plan, parameter groups, cost and memory of every phase, and lists missing inputs.

Models are on the meta device, so the 9b fits a laptop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from timeviper_model.config import TimeViperConfig
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import TOKENIZER_FILES, load_tokenizer
from timeviper_platform.common import storage
from timeviper_platform.common.devices import PEAK_FLOPS
from timeviper_platform.common.machine_cache import local_copy
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.packing import Pack
from timeviper_platform.training.batches.rows import missing_sources
from timeviper_platform.training.batches.sizes import count_rejects
from timeviper_platform.training.config import InitConfig, PhaseConfig, TrainConfig
from timeviper_platform.training.cost.flops import ASSUMED_DEVICE, ASSUMED_MFU, gpu_hours, training_flops
from timeviper_platform.training.cost.memory import (
    ModelSizes,
    StateBytes,
    activation_bytes,
    state_bytes,
    tokens_by_layer,
)
from timeviper_platform.training.cost.mixture import (
    ASSUMED_FILL,
    ExpectedEpoch,
    SourceShare,
    expected_epoch,
    source_shares,
)
from timeviper_platform.training.cost.node import STORAGE_BYTES_PER_S, NodeNeeds, node_needs
from timeviper_platform.training.optim.parameter_groups import (
    ParameterGroup,
    any_block_trained,
    describe_groups,
    trained_share,
)
from timeviper_platform.training.phase import adapt, first_model_config, phase_groups, prepare_phase
from timeviper_platform.training.run import RunFolder

ZERO_STAGES = (0, 1, 2, 3)
STEPS_WITHOUT_PLAN = 1000
"""Assumed steps when the number of samples is unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFacts:
    """First epoch of a phase's pack plan."""

    num_samples: int
    rejects: dict[str, int]
    num_packs: int
    num_steps: int
    fill: float
    text_tokens: int
    vision_tokens: tuple[int, ...]
    """Vision tokens before the language model and after each TransV site."""
    num_dummies_per_step: int
    """Dummy micro-steps of a full step, over all ranks."""
    largest_pack: Pack
    mean_pack_flops: float
    """Forward and backward operations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseFacts:
    name: str
    groups: list[ParameterGroup]
    sizes: ModelSizes
    plan: PlanFacts | None
    """None when samples, feature store or tokenizer are missing."""
    states: dict[int, StateBytes]
    """Bytes of one rank, by ZeRO stage."""
    node: NodeNeeds
    activations: int
    """Bytes of the costliest pack, or of a full pack of text."""
    num_steps: int
    """Steps of the phase; STEPS_WITHOUT_PLAN when unknown."""
    flops: float
    """Operations of these steps; full packs of text when samples are unknown."""
    sources: list[SourceShare]
    expected: ExpectedEpoch | None
    """Epoch of the unplanned sources; None if there are none, or one lacks `expected`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    phases: list[PhaseFacts]
    problems: list[str]
    """Missing inputs; empty when the run could start."""


def dry_run(config: TrainConfig) -> DryRun:
    """Prepares every phase; raises ValueError when existing inputs do not fit together."""
    problems: list[str] = []
    store = _open_store(config, problems)
    tokenizer = _load_tokenizer(config, problems)
    phases: list[PhaseFacts] = []
    model_config: TimeViperConfig | None = None
    for name, phase in config.phases.items():
        init = _known_init(name, phase.init, problems)
        model_config = _model_config(config, init, store, model_config, problems)
        missing = missing_sources(phase.samples)
        problems += [f"phases.{name}.samples: no files at {uri}" for uri in missing]
        if model_config is not None:
            phases.append(_phase_facts(config, name, model_config, store, tokenizer, missing))
    return DryRun(phases=phases, problems=problems)


def describe_dry_run(config: TrainConfig, result: DryRun) -> str:
    workers = f"{config.workers.max_workers} ranks, {config.dtype}, ZeRO-{config.zero.stage}"
    lines = [f"run {RunFolder.of(config).uri}: {workers}"]
    for phase in result.phases:
        groups = "  " + describe_groups(phase.groups, phase.sizes.num_parameters)
        lines += [
            "",
            f"phase {phase.name}",
            *_plan_lines(phase, config),
            _compute_line(phase),
            groups,
            *_memory_lines(phase, config),
            *_node_lines(phase.node, config),
        ]
    if result.problems:
        lines += ["", "missing:", *(f"  {problem}" for problem in result.problems)]
    return "\n".join(lines)


def _open_store(config: TrainConfig, problems: list[str]) -> FeatureStore | None:
    try:
        return FeatureStore.open(config.feature_store)
    except (ValueError, OSError) as error:
        problems.append(f"feature_store: {error}")
        return None


def _load_tokenizer(config: TrainConfig, problems: list[str]) -> object | None:
    try:
        return load_tokenizer(local_copy(config.tokenizer, TOKENIZER_FILES))
    except (ValueError, OSError) as error:
        problems.append(f"tokenizer: {config.tokenizer!r} cannot be loaded: {str(error).splitlines()[0]}")
        return None


def _known_init(name: str, init: InitConfig | None, problems: list[str]) -> InitConfig | None:
    """Replaces a backbone that cannot be read by the preset alone, for its sizes."""
    if init is None or init.backbone is None or init.preset is None:
        return init
    try:
        init.model_config()
    except ValueError as error:
        problems.append(f"phases.{name}.init: {error}")
        return replace(init, backbone=None, revision=None)
    return init


def _model_config(
    config: TrainConfig,
    init: InitConfig | None,
    store: FeatureStore | None,
    before: TimeViperConfig | None,
    problems: list[str],
) -> TimeViperConfig | None:
    if init is None:
        return before
    if store is not None:
        try:
            return first_model_config(init, store, config.encoder, config.second_encoder)
        except ValueError as error:
            if init.weights is None or storage.exists(init.weights):
                raise
            problems.append(str(error))
    elif init.weights is not None:
        problems.append(f"the weights {init.weights} cannot be checked without the feature store")
    return before if init.preset is None and init.backbone is None else init.model_config()


def _phase_facts(
    config: TrainConfig,
    name: str,
    model_config: TimeViperConfig,
    store: FeatureStore | None,
    tokenizer: object | None,
    missing: Sequence[str],
) -> PhaseFacts:
    phase = config.phases[name]
    with torch.device("meta"):
        model = adapt(TimeViper(model_config), phase, config.seed)
    groups = phase_groups(model, phase)
    sizes = ModelSizes(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_trained=sum(group.num_parameters for group in groups),
    )
    trains_blocks, share = any_block_trained(groups), trained_share(model, groups)
    plan = None
    present = tuple(source for source in phase.samples if source.uri not in missing)
    if store is not None and tokenizer is not None and present:
        own = replace(config, phases={**config.phases, name: replace(phase, samples=present)})
        plan = _plan_facts(own, name, model, store, tokenizer, trained_share=share)
    unplanned = missing if plan is not None else [source.uri for source in phase.samples]
    expected = expected_epoch(model_config, phase, unplanned, trained_share=share)
    pack = plan.largest_pack if plan is not None else _full_text_pack(phase)
    if expected is not None:
        num_steps, pack_flops = _expected_steps(phase, plan, expected)
    elif plan is not None:
        num_steps, pack_flops = plan.num_steps, plan.mean_pack_flops
    else:
        num_steps = phase.steps or STEPS_WITHOUT_PLAN
        pack_flops = training_flops(model_config, pack, use_transv=phase.use_transv, trained_share=share)
    return PhaseFacts(
        name=name,
        groups=groups,
        sizes=sizes,
        plan=plan,
        states={
            stage: state_bytes(sizes, zero_stage=stage, world_size=config.workers.max_workers, dtype=config.dtype)
            for stage in ZERO_STAGES
        },
        node=node_needs(
            sizes,
            zero_stage=config.zero.stage,
            world_size=config.workers.max_workers,
            dtype=config.dtype,
            use_gpu=config.workers.use_gpu,
            offload_optimizer=config.zero.offload_optimizer,
            cache_bytes=config.loader.cache_bytes + config.loader.prefetch_bytes,
            remote=not storage.is_local(config.runs),
        ),
        activations=activation_bytes(
            model_config,
            pack,
            dtype=config.dtype,
            use_transv=phase.use_transv,
            activation_checkpointing=config.activation_checkpointing,
            trains_blocks=trains_blocks,
        ),
        num_steps=num_steps,
        flops=pack_flops * num_steps * phase.packs_per_step,
        sources=source_shares(phase.samples, missing),
        expected=expected,
    )


def _expected_steps(phase: PhaseConfig, plan: PlanFacts | None, expected: ExpectedEpoch) -> tuple[int, float]:
    num_packs = expected.num_packs(phase.packing.max_tokens) + (plan.num_packs if plan else 0)
    flops = expected.flops + (plan.num_packs * plan.mean_pack_flops if plan else 0.0)
    num_steps = phase.steps or math.ceil(num_packs * (phase.epochs or 1) / phase.packs_per_step)
    return num_steps, flops / num_packs


def _plan_facts(
    config: TrainConfig, name: str, model: TimeViper, store: FeatureStore, tokenizer: object, *, trained_share: float
) -> PlanFacts:
    prepared = prepare_phase(config, name, model, store, tokenizer, rank=0, world_size=config.workers.max_workers)
    phase, table = prepared.config, prepared.plan.table
    packs = prepared.plan.epoch(0)
    costs = [sum(tokens_by_layer(model.config, pack, use_transv=phase.use_transv)) for pack in packs]
    flops = [
        training_flops(model.config, pack, use_transv=phase.use_transv, trained_share=trained_share) for pack in packs
    ]
    num_tokens = sum(pack.num_tokens for pack in packs)
    num_ranks = config.workers.max_workers
    return PlanFacts(
        num_samples=len(table),
        rejects=count_rejects(prepared.rejects),
        num_packs=len(packs),
        num_steps=prepared.num_steps,
        fill=num_tokens / (len(packs) * phase.packing.max_tokens),
        text_tokens=num_tokens - sum(pack.num_vision_tokens for pack in packs),
        vision_tokens=_vision_tokens(model.config, packs, use_transv=phase.use_transv),
        num_dummies_per_step=prepared.loader.num_micro_steps * num_ranks - phase.packs_per_step,
        largest_pack=packs[int(np.argmax(costs))],
        mean_pack_flops=float(np.mean(flops)),
    )


def _full_text_pack(phase: PhaseConfig) -> Pack:
    tokens = phase.packing.max_tokens
    return Pack(num_tokens=tokens, vision_counts=(), num_targets=tokens)


def _vision_tokens(config: TimeViperConfig, packs: Sequence[Pack], *, use_transv: bool) -> tuple[int, ...]:
    before = sum(pack.num_vision_tokens for pack in packs)
    num_text = sum(pack.num_tokens for pack in packs) - before
    by_layer = np.sum([tokens_by_layer(config, pack, use_transv=use_transv) for pack in packs], axis=0) - num_text
    return (before, *(int(by_layer[site.layer]) for site in config.transv))


def _plan_lines(phase: PhaseFacts, config: TrainConfig) -> list[str]:
    plan, own = phase.plan, config.phases[phase.name]
    lines = [_source_line(source) for source in phase.sources]
    if plan is None:
        return ["  no plan: samples, feature store or tokenizer are missing", *lines]
    vision = " -> ".join(f"{count:,}" for count in plan.vision_tokens)
    return [
        f"  samples: {plan.num_samples:,} usable, rejects {plan.rejects or 'none'}"
        + (", of the sources that exist" if any(source.is_absent for source in phase.sources) else ""),
        *lines,
        f"  plan: {plan.num_packs:,} packs per epoch, fill {plan.fill:.2%} of {own.packing.max_tokens:,} tokens,"
        f" {plan.num_steps:,} steps of {own.packs_per_step} packs,"
        f" {plan.num_dummies_per_step} of a step's micro-steps are dummies",
        f"  tokens per epoch: {plan.text_tokens:,} text; vision before and after each TransV site {vision}",
    ]


def _source_line(source: SourceShare) -> str:
    share = "      ?" if source.share is None else f"{source.share:7.2%}"
    count = "" if source.num_samples is None else f", {source.num_samples:,.0f} samples"
    return f"    {share}  {source.uri}{f' (absent{count})' if source.is_absent else ''}"


def _compute_line(phase: PhaseFacts) -> str:
    scope = ""
    if phase.expected is not None:
        scope = (
            f" of the whole mixture, {phase.expected.num_samples:,.0f} samples as configured in `expected`"
            f" ({phase.expected.num_tokens / phase.expected.num_samples:,.0f} tokens each, fill {ASSUMED_FILL:.0%})"
        )
    elif phase.plan is None:
        scope = " of full packs of text"
    return (
        f"  compute: {phase.flops:.3g} FLOPs in {phase.num_steps:,} steps{scope},"
        f" {gpu_hours(phase.flops):,.1f} GPU-hours at {ASSUMED_MFU:.0%} of an H100's"
        f" {PEAK_FLOPS[ASSUMED_DEVICE] / 1e12:.0f} TFLOP/s"
    )


def _memory_lines(phase: PhaseFacts, config: TrainConfig) -> list[str]:
    source = "the costliest pack" if phase.plan is not None else "a full pack of text"
    lines = [
        f"  memory of a rank in GB (activations of {source}; without DeepSpeed's buckets):",
        f"    {'stage':<8}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'activations':>13}{'sum':>10}",
    ]
    if config.zero.offload_optimizer:
        lines.insert(1, "    the optimizer is in host memory and not in the sum")
    for stage, states in phase.states.items():
        mark = " <-" if stage == config.zero.stage else ""
        figures = f"{states.parameters / 1e9:>12.3f}{states.gradients / 1e9:>12.3f}{states.optimizer / 1e9:>12.3f}"
        offloaded = states.optimizer if config.zero.offload_optimizer else 0
        total = (states.total - offloaded + phase.activations) / 1e9
        lines.append(f"    ZeRO-{stage:<3}{figures}{phase.activations / 1e9:>13.3f}{total:>10.3f}{mark}")
    return lines


def _node_lines(node: NodeNeeds, config: TrainConfig) -> list[str]:
    def gb(num_bytes: float) -> str:
        return f"{num_bytes / 1e9:.3f}"

    disk = f", {gb(node.disk)} of TMPDIR (weights, and a checkpoint on resuming)" if node.disk else ""
    optimizer = f", optimizer {gb(node.host_optimizer)}" if node.host_optimizer else ""
    num_kept = config.checkpoint.keep + 1
    return [
        f"  a node of {node.num_ranks} ranks in GB: host memory {gb(node.host)} (start {gb(node.host_start)}, save"
        f" {gb(node.host_save)}, loader {gb(node.host_caches)}{optimizer}){disk}",
        f"  a checkpoint: {gb(node.checkpoint)} GB, {gb(num_kept * node.checkpoint)} for keep + 1; a save or resume"
        f" moves {gb(node.traffic)} GB per node, {node.seconds:.1f} s at {STORAGE_BYTES_PER_S / 1e9:g} GB/s",
    ]
