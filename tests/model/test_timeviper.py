from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.slow_timeviper import slow_logits
from reference.small_models import SMALL, SMALL_QWEN, first_tokens, make_features, make_model, make_sample, pack
from timeviper_model.analysis.dropping import with_plan
from timeviper_model.batching.batch import IGNORE_INDEX, PADDING_SEGMENT, PackedBatch, pack_samples
from timeviper_model.config import PRESETS, TimeViperConfig, TransVSite
from timeviper_model.inference.prefill import prefill
from timeviper_model.timeviper import TimeViper

LAYOUTS = [
    "sss" + "v" * 24 + "iiii" + "rrrr",
    "s" + "v" * 9 + "iiiiirr",
    "ssiiirrrr",
    "vvvvvvvviirrriirr",
    "vviivvvvvirr",
]


PLAIN = tuple(replace(site, transfer="none") for site in SMALL.transv)


def gradients(
    model: TimeViper, batch: PackedBatch, *, use_transv: bool = True
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(batch, use_transv=use_transv).loss_sum
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_plan_that_keeps_everything_changes_nothing_at_all() -> None:
    model = make_model(
        replace(
            SMALL,
            transv=(TransVSite(layer=1, select="uniform", keep=1.0), TransVSite(layer=4, select="attention", keep=1.0)),
        ),
        dtype=torch.float32,
    )
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)], dtype=torch.float32)
    with_plan, without = model(batch), model(batch, use_transv=False)
    assert torch.equal(with_plan.loss_sum, without.loss_sum)
    assert with_plan.num_vision_tokens.tolist() == without.num_vision_tokens.tolist() == [48, 48, 48]


def test_closed_gate_with_drops_is_plain_dropping_exactly() -> None:
    closed = make_model(alpha=0.0, dtype=torch.float32)
    plain = TimeViper(replace(SMALL, transv=PLAIN))
    plain.load_state_dict({k: v for k, v in closed.state_dict().items() if not k.startswith("transv")})
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)], dtype=torch.float32)
    assert torch.equal(closed(batch).loss_sum, plain(batch).loss_sum)
    assert not torch.equal(make_model(dtype=torch.float32)(batch).loss_sum, plain(batch).loss_sum)


@pytest.mark.parametrize("config", [SMALL, SMALL_QWEN], ids=["hybrid", "rope"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefill_and_decode_equal_teacher_forcing(layout: str, config: TimeViperConfig) -> None:
    sample = make_sample(layout)
    prompt_length = layout.index("r")
    prompt = first_tokens(sample, prompt_length)
    model = make_model(config, dtype=torch.float32)
    features = make_features(sample, dtype=torch.float32)
    prompt_features = features[: prompt.num_vision_tokens]
    # every answer token is labelled; the media end before the first answer
    only_first = first_tokens(sample, prompt_length + layout[prompt_length:].split("i")[0].count("r"))
    expected, _ = model.target_log_probs(pack_samples([only_first], [prompt_features]))
    cache = model.new_cache(2, device="cpu", dtype=torch.float32)
    logits = prefill(model, pack_samples([prompt], [prompt_features]), cache, 1)
    found = []
    for token in only_first.input_ids[prompt_length:]:
        found.append(logits.log_softmax(-1)[token])
        logits = model.decode_step(torch.tensor([token]), cache, torch.tensor([1]))[0]
    torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=5e-7 * float(expected.abs().max()))
    assert cache.num_tokens == [0, len(only_first)]


def test_decode_in_float64_equals_the_formulas_written_out() -> None:
    model = make_model()
    layout = "sss" + "v" * 20 + "iiii" + "r" * 9
    sample = make_sample(layout)
    features = make_features(sample)
    slow, _ = slow_logits(model, sample, features)
    cache = model.new_cache(1, device="cpu", dtype=torch.float64)
    logits = prefill(model, pack_samples([first_tokens(sample, 27)], [features]), cache, 0)
    torch.testing.assert_close(logits, slow[-10].detach())
    for step, token in enumerate(sample.input_ids[27:]):
        logits = model.decode_step(torch.tensor([token]), cache, torch.tensor([0]))[0]
        torch.testing.assert_close(logits, slow[step - 9].detach())


def test_slots_decoded_together_equal_slots_decoded_alone() -> None:
    model = make_model()
    prompts = [
        make_sample(layout, seed=n)
        for n, layout in enumerate(["s" + "v" * 200 + "ii", "svvvvii", "ii", "s" + "v" * 30 + "iii"])
    ]
    alone = []
    for index, prompt in enumerate(prompts):
        cache = model.new_cache(1, device="cpu", dtype=torch.float64)
        prefill(model, pack([prompt]), cache, 0)
        logits = [model.decode_step(torch.tensor([token + index]), cache, torch.tensor([0]))[0] for token in (3, 5, 7)]
        alone.append(logits)
    cache = model.new_cache(6, device="cpu", dtype=torch.float64)
    slots = [4, 0, 1, 3]
    for prompt, slot in zip(prompts, slots, strict=True):
        prefill(model, pack([prompt]), cache, slot)
    for step, token in enumerate((3, 5, 7)):
        together = model.decode_step(torch.tensor([token + n for n in range(4)]), cache, torch.tensor(slots))
        torch.testing.assert_close(together, torch.stack([logits[step] for logits in alone]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_packed_samples_equal_separate_ones_in_loss_and_every_gradient(dtype: torch.dtype, tolerance: float) -> None:
    model = make_model(dtype=dtype)
    samples = [make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)]
    loss, grads = gradients(model, pack(samples, dtype=dtype, pad_to=140))
    separate = [gradients(model, pack([sample], dtype=dtype)) for sample in samples]
    assert loss == pytest.approx(sum(loss for loss, _ in separate), rel=tolerance)
    assert set(grads) == {name for name, _ in model.named_parameters()}
    for name, grad in grads.items():
        total = torch.stack([part[name] for _, part in separate]).sum(0)
        torch.testing.assert_close(grad, total, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


DRAWN_LAYOUTS = st.lists(st.text("virri", min_size=1, max_size=14).map("s".__add__), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(layouts=DRAWN_LAYOUTS, config=st.sampled_from([SMALL, SMALL_QWEN]), padding=st.integers(0, 3))
def test_any_pack_equals_its_samples_in_loss_and_every_gradient(
    layouts: list[str], config: TimeViperConfig, padding: int
) -> None:
    model = make_model(config)
    samples = [make_sample(layout, seed=n) for n, layout in enumerate(layouts)]
    loss, grads = gradients(model, pack(samples, pad_to=sum(map(len, layouts)) + padding))
    separate = [gradients(model, pack([sample])) for sample in samples]
    assert loss == pytest.approx(sum(loss for loss, _ in separate))
    for name, grad in grads.items():
        total = torch.stack([part[name] for _, part in separate]).sum(0)
        torch.testing.assert_close(grad, total, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=15, deadline=None)
@given(layouts=DRAWN_LAYOUTS, config=st.sampled_from([SMALL, SMALL_QWEN]))
def test_a_plan_that_keeps_all_of_any_pack_changes_nothing(layouts: list[str], config: TimeViperConfig) -> None:
    everything = tuple(replace(site, keep=1.0) for site in config.transv)
    model = make_model(replace(config, transv=everything), dtype=torch.float32)
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(layouts)], dtype=torch.float32)
    assert torch.equal(model(batch).loss_sum, model(batch, use_transv=False).loss_sum)


def test_neighbours_and_their_order_change_nothing() -> None:
    model = make_model(dtype=torch.float32)
    samples = [make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)]
    scores, ids = model.target_log_probs(pack(samples, dtype=torch.float32))
    order = [3, 0, 4, 2, 1]
    swapped, swapped_ids = model.target_log_probs(pack([samples[n] for n in order], dtype=torch.float32))
    for index, original in enumerate(order):
        torch.testing.assert_close(swapped[swapped_ids == index], scores[ids == original], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layouts", [["ssiirr"], ["svvvviirr"], ["vvvviirr", "ssss"], ["ssss"], ["vvvv"], ["v"]])
@pytest.mark.parametrize("use_transv", [True, False])
def test_every_parameter_takes_part_whatever_the_pack_holds(layouts: list[str], use_transv: bool) -> None:
    model = make_model()
    out = model(pack([make_sample(layout) for layout in layouts]), use_transv=use_transv)
    out.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


NOTHING_LEFT = replace(SMALL, transv=(TransVSite(layer=1, select="uniform", keep=0.0),))


@pytest.mark.parametrize("config", [SMALL, NOTHING_LEFT, replace(NOTHING_LEFT, transv=())])
@pytest.mark.parametrize("layouts", [["vvvv"], ["vvvv", "v"], []])
def test_a_pack_that_loses_every_token_runs_without_gradients(config: TimeViperConfig, layouts: list[str]) -> None:
    model = make_model(config)
    batch = pack([make_sample(layout) for layout in layouts or ["ss"]], pad_to=7)
    batch = batch if layouts else replace(batch, segment_ids=torch.full((7,), PADDING_SEGMENT, dtype=torch.int32))
    with torch.no_grad():
        output = model(batch)
    assert (float(output.loss_sum), int(output.num_targets)) == (0.0, 0)
    assert [len(tensor) for tensor in model.target_log_probs(batch)] == [0, 0]


def test_frozen_modules_stay_out_of_the_graph_and_the_projector_still_learns() -> None:
    model = make_model()
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    model(pack([make_sample("svvvviirr")]), use_transv=False).loss_sum.backward()
    assert all((p.grad is not None) == name.startswith("projector") for name, p in model.named_parameters())


@pytest.mark.parametrize("use_transv", [True, False])
@pytest.mark.parametrize("layouts", [LAYOUTS, ["ssiirr"]])
def test_activation_checkpointing_changes_no_gradient(layouts: list[str], use_transv: bool) -> None:
    model = make_model()
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(layouts)])
    loss, grads = gradients(model, batch, use_transv=use_transv)
    model.gradient_checkpointing = True
    again, again_grads = gradients(model, batch, use_transv=use_transv)
    assert again == loss
    torch.testing.assert_close(again_grads, grads, rtol=0, atol=0)


def saved_bytes(model: TimeViper, batch: PackedBatch) -> int:
    """Bytes that the graph of a loss keeps for its backward pass, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        loss = model(batch).loss_sum
    assert loss.requires_grad  # keeps the graph alive until here
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_checkpointed_blocks_and_sites_keep_little_but_hidden_states() -> None:
    model = make_model(dtype=torch.float32)
    batch = pack([make_sample("ss" + "v" * 400 + "i" * 20 + "rrrr")], dtype=torch.float32)
    everything = saved_bytes(model, batch)
    model.gradient_checkpointing = True
    checkpointed = saved_bytes(model, batch)
    assert checkpointed < everything / 5
    # a site adds the states before it and indices, but no queries, keys or values
    states = (426 + 226) * SMALL.text.hidden_size * 4
    assert checkpointed - saved_bytes(with_plan(model, PLAIN), batch) < states * 1.2


def test_logits_in_chunks_give_the_same_loss_and_gradients() -> None:
    model = make_model()
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)])
    whole, grads = gradients(model, batch)
    scores, _ = model.target_log_probs(batch)
    model.logits_elements = 4 * SMALL.text.vocab_size
    in_chunks, chunk_grads = gradients(model, batch)
    assert in_chunks == pytest.approx(whole)
    torch.testing.assert_close(chunk_grads, grads)
    torch.testing.assert_close(model.target_log_probs(batch)[0], scores)


@pytest.mark.parametrize("grad", [True, False])
def test_every_pack_calls_every_module_equally_often_in_training(grad: bool) -> None:
    """Under ZeRO-3 a call is a collective. Before, `lm_head` ran once per chunk of labels, and a projector or TransV
    layer without work was skipped when frozen or in validation."""
    calls: list[str] = []
    model = make_model().train()
    model.projector.requires_grad_(False)
    model.logits_elements = 2 * SMALL.text.vocab_size
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
    counts = []
    for layout in ("s" + "v" * 24 + "iiii" + "r" * 9, "siir", "siii", "vvr"):
        calls.clear()
        with torch.set_grad_enabled(grad):
            model(pack([make_sample(layout)]))
        counts.append(Counter(name for name in calls if list(model.get_submodule(name).parameters(recurse=False))))
    assert counts[0]["lm_head"] == counts[0]["backbone.norm_f"] == 1
    assert counts.count(counts[0]) == len(counts)


def test_target_log_probs_are_the_loss_sample_by_sample() -> None:
    model = make_model()
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)], pad_to=150)
    scores, ids = model.target_log_probs(batch)
    out = model(batch)
    assert -scores.sum().item() == pytest.approx(out.loss_sum.item())
    assert len(scores) == int(out.num_targets) == int((batch.labels != IGNORE_INDEX).sum())
    assert torch.equal(ids, batch.segment_ids[batch.labels != IGNORE_INDEX].long())


def test_logits_are_computed_for_the_labelled_positions_alone() -> None:
    model = make_model()
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)], pad_to=150)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    model(batch).loss_sum.backward()
    model.target_log_probs(batch)
    assert rows == [int((batch.labels != IGNORE_INDEX).sum())] * 2


def test_vision_tokens_are_counted_at_the_entrance_and_after_each_site() -> None:
    out = make_model()(pack([make_sample("s" + "v" * 24 + "iirr"), make_sample("svvviirr")]))
    assert out.num_vision_tokens.tolist() == [27, 12 + 2, 6 + 1]


def test_invalid_slots_are_refused() -> None:
    model = make_model()
    cache = model.new_cache(2, device="cpu", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"slots \[0\] have no prompt"):
        model.decode_step(torch.tensor([1]), cache, torch.tensor([0]))
    with pytest.raises(ValueError, match="one prompt, not 2"):
        prefill(model, pack([make_sample("si"), make_sample("si")]), cache, 0)
    with pytest.raises(ValueError, match="slot 2 of a cache with 2 slots"):
        prefill(model, pack([make_sample("si")]), cache, 2)


def test_same_generator_seed_gives_the_same_weights() -> None:
    first, second = (make_model(seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_model(seed=4).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_tied_embeddings_are_one_parameter() -> None:
    model = make_model(replace(SMALL, text=replace(SMALL.text, tie_word_embeddings=True)))
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_nine_billion_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = TimeViper(PRESETS["9b"])
    counts = {
        prefix: sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefix))
        for prefix in ("backbone", "lm_head", "transv", "projector")
    }
    assert counts["backbone"] + counts["lm_head"] == 8_888_227_328
    assert counts["transv"] == 110_100_482
    assert counts["projector"] == 25_240_320
    assert sum(counts.values()) == 9_023_568_130


def test_a_bf16_model_stays_near_its_fp32_twin() -> None:
    evenly = tuple(replace(site, select="uniform") for site in SMALL.transv)  # selection must not depend on rounding
    model = make_model(replace(SMALL, transv=evenly), dtype=torch.float32)
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)], dtype=torch.float32)
    full = model(batch)
    half = model.bfloat16()(batch)
    assert torch.equal(half.num_vision_tokens, full.num_vision_tokens)
    assert full.num_vision_tokens[-1] < full.num_vision_tokens[0]
    assert half.loss_sum.dtype == torch.float32
    assert half.loss_sum.item() == pytest.approx(full.loss_sum.item(), rel=0.05)
    half.loss_sum.backward()


def test_one_step_of_training_lowers_the_loss() -> None:
    model = make_model()
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(batch).loss_sum
    before.backward()
    optimizer.step()
    assert model(batch).loss_sum < before
