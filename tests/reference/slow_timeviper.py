"""TimeViper for ONE sample, written as formulas: full matrices, loops over tokens, no packing, no cache."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.slow_scan import slow_conv_silu, slow_hidden_attention, slow_scan
from timeviper_model.batching.batch import IGNORE_INDEX, Sample, TokenKind
from timeviper_model.config import HybridConfig, Qwen2Config, TextConfig, TransVSite
from timeviper_model.timeviper import TimeViper


def slow_loss_sum(model: TimeViper, sample: Sample, features: Tensor, *, use_transv: bool = True) -> Tensor:
    if all(label == IGNORE_INDEX for label in sample.labels):
        return torch.zeros(())  # such a sample may lose every token
    logits, kept = slow_logits(model, sample, features, use_transv=use_transv)
    labels = torch.tensor(sample.labels)[kept]
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


MayRead = Callable[[int, list[int]], Tensor | None]
"""(layer, kinds of the tokens present) -> bool (L, L), query x token, within the causal triangle; None = all."""


def slow_logits(
    model: TimeViper,
    sample: Sample,
    features: Tensor,
    *,
    use_transv: bool = True,
    may_read: MayRead = lambda layer, kinds: None,
) -> tuple[Tensor, list[int]]:
    """Logits (L', V) of every token that reaches the last block, and the indices of those tokens in the sample."""
    text = model.config.text
    params = dict(model.named_parameters())
    projected = F.linear(features, params["projector.fc1.weight"], params["projector.fc1.bias"])
    projected = F.linear(F.gelu(projected), params["projector.fc2.weight"], params["projector.fc2.bias"])
    rows = [
        projected[vision] if vision >= 0 else params["backbone.embeddings.weight"][token]
        for token, vision in zip(sample.input_ids, sample.vision_index, strict=True)
    ]
    h = torch.stack(rows)
    tokens = list(range(len(sample)))
    sites = {site.layer: site for site in model.config.transv}
    if use_transv and 0 in sites and sites[0].select == "evs":
        num_kept = math.floor(sites.pop(0).keep * sample.num_vision_tokens + 0.5)
        tokens = slow_evs(sample, features, model.config.vision.tokens_per_frame, num_kept)
        h = h[tokens]
    for layer, kind in enumerate(text.block_types):
        block = {
            name.removeprefix(f"backbone.layers.{layer}."): value
            for name, value in params.items()
            if name.startswith(f"backbone.layers.{layer}.")
        }
        if use_transv and layer in sites:
            cross = {
                name.removeprefix(f"transv.{layer}."): value
                for name, value in params.items()
                if name.startswith(f"transv.{layer}.")
            }
            h, tokens = _transv(h, tokens, sample, sites[layer], cross, block, text)
        mask = may_read(layer, [sample.token_kind[token] for token in tokens])
        if isinstance(text, Qwen2Config):
            h = _qwen2_layer(h, tokens, block, text, mask)
        else:
            normed = _rms(h, block["norm.weight"], text.layer_norm_epsilon)
            if kind == "mlp":
                h = h + _mlp(normed, block, text)
            else:
                h = h + {"mamba": _mamba, "attention": _attention}[kind](normed, block, text, mask)
    eps = text.rms_norm_eps if isinstance(text, Qwen2Config) else text.layer_norm_epsilon
    h = _rms(h, params["backbone.norm_f.weight"], eps)
    return h @ params["lm_head.weight"].t(), tokens


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _mlp(x: Tensor, p: dict[str, Tensor], config: HybridConfig) -> Tensor:
    return F.relu(x @ p["mixer.up_proj.weight"].t()).square() @ p["mixer.down_proj.weight"].t()


def _mamba(x: Tensor, p: dict[str, Tensor], c: HybridConfig, may_read: Tensor | None) -> Tensor:
    inner = c.mamba_intermediate_size
    (gate, values), *operands = _mamba_inputs(x, p, c, may_read)
    operands.insert(1, -torch.exp(p["mixer.A_log"]))
    if may_read is None:
        y, _ = slow_scan(values, *operands, p["mixer.D"])
    else:
        weights = slow_hidden_attention(*operands) * may_read
        y = torch.einsum("hij,jhp->ihp", weights, values) + p["mixer.D"][:, None] * values
    gated = (y.reshape(len(x), inner) * F.silu(gate)).reshape(len(x), c.n_groups, inner // c.n_groups)
    normed = _rms(gated, torch.ones(()), c.layer_norm_epsilon).reshape(len(x), inner) * p["mixer.norm.weight"]
    return normed @ p["mixer.out_proj.weight"].t()


def _mamba_inputs(
    x: Tensor, p: dict[str, Tensor], c: HybridConfig, may_read: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """(gate, values), dt, B and C after the convolution."""
    inner, shared = c.mamba_intermediate_size, c.n_groups * c.ssm_state_size
    gate, channels, dt = (x @ p["mixer.in_proj.weight"].t()).split([inner, inner + 2 * shared, c.mamba_num_heads], -1)
    channels = slow_conv_silu(
        channels, p["mixer.conv1d.weight"].squeeze(1), p["mixer.conv1d.bias"], torch.arange(len(x)), may_read
    )
    values, B, C = channels.split([inner, shared, shared], -1)
    return (
        (gate, values.reshape(len(x), c.mamba_num_heads, c.mamba_head_dim)),
        F.softplus(dt + p["mixer.dt_bias"]).clamp(*c.time_step_limit),
        B.reshape(len(x), c.n_groups, c.ssm_state_size),
        C.reshape(len(x), c.n_groups, c.ssm_state_size),
    )


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.reshape(len(x), x.shape[1] // head_dim, head_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """(Q, H * E); a query that sees nothing gets zeros."""
    repeats = q.shape[1] // k.shape[1]
    outputs = torch.zeros_like(q)
    for i in range(len(q)):
        if not visible[i].any():
            continue
        for head in range(q.shape[1]):
            keys, values = k[visible[i], head // repeats], v[visible[i], head // repeats]
            weights = torch.softmax(keys @ q[i, head] / math.sqrt(q.shape[-1]), 0)
            outputs[i, head] = weights @ values
    return outputs.flatten(1)


def _attention(x: Tensor, p: dict[str, Tensor], c: HybridConfig, may_read: Tensor | None) -> Tensor:
    q, k, v = (_heads(x @ p[f"mixer.{name}_proj.weight"].t(), c.head_dim) for name in "qkv")
    return _attend(q, k, v, _visible(len(x), may_read)) @ p["mixer.o_proj.weight"].t()


def _visible(length: int, may_read: Tensor | None) -> Tensor:
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal if may_read is None else causal & may_read


def _qwen2_layer(h: Tensor, tokens: list[int], p: dict[str, Tensor], c: Qwen2Config, may_read: Tensor | None) -> Tensor:
    q, k = _qwen2_queries_and_keys(h, tokens, p, c)
    normed = _rms(h, p["input_layernorm.weight"], c.rms_norm_eps)
    v = _heads(normed @ p["self_attn.v_proj.weight"].t() + p["self_attn.v_proj.bias"], c.head_dim)
    h = h + _attend(q, k, v, _visible(len(h), may_read)) @ p["self_attn.o_proj.weight"].t()
    normed = _rms(h, p["post_attention_layernorm.weight"], c.rms_norm_eps)
    gate, up = (normed @ p[f"mlp.{name}_proj.weight"].t() for name in ("gate", "up"))
    return h + (gate * torch.sigmoid(gate) * up) @ p["mlp.down_proj.weight"].t()


def _qwen2_queries_and_keys(
    h: Tensor, tokens: list[int], p: dict[str, Tensor], c: Qwen2Config
) -> tuple[Tensor, Tensor]:
    """Rotated by each token's index in the WHOLE sample, which `tokens` holds."""
    normed = _rms(h, p["input_layernorm.weight"], c.rms_norm_eps)
    turned = []
    for name in "qk":
        x = _heads(normed @ p[f"self_attn.{name}_proj.weight"].t() + p[f"self_attn.{name}_proj.bias"], c.head_dim)
        turned.append(torch.stack([_rope(x[row], position, c.rope_theta) for row, position in enumerate(tokens)]))
    return turned[0], turned[1]


def _rope(x_HE: Tensor, position: int, theta: float) -> Tensor:
    """Each pair (j, j + E / 2) as a complex number, multiplied by exp(i * position * theta ** (-2j / E))."""
    half = x_HE.shape[1] // 2
    planes = torch.complex(x_HE[:, :half], x_HE[:, half:])
    angles = [position * theta ** (-2 * j / x_HE.shape[1]) for j in range(half)]
    planes = planes * torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=planes.dtype)
    return torch.cat([planes.real, planes.imag], dim=1)


def _transv(
    h: Tensor,
    tokens: list[int],
    sample: Sample,
    site: TransVSite,
    cross: dict[str, Tensor],
    block: dict[str, Tensor],
    c: TextConfig,
) -> tuple[Tensor, list[int]]:
    kinds = [sample.token_kind[token] for token in tokens]
    vision = [index for index, kind in enumerate(kinds) if kind == TokenKind.VISION]
    k = min(len(vision), math.floor(site.keep * sample.num_vision_tokens + 0.5))
    if site.select == "uniform":
        kept = [vision[j * (len(vision) - 1) // (k - 1) if k > 1 else 0] for j in range(k)]
    else:
        score = slow_importance if site.select == "importance" else slow_scores
        scores = score(h, tokens, kinds, block, c)
        kept = sorted(sorted(vision, key=lambda index: (-scores[index], index))[:k])
    dropped = [index for index in vision if index not in kept]
    if cross:
        h = h + _update(h, kinds, kept if site.transfer_from == "kept" else dropped, cross, c)
    stay = [index for index in range(len(tokens)) if index not in dropped]
    return h[stay], [tokens[index] for index in stay]


def slow_scores(h: Tensor, tokens: list[int], kinds: list[int], block: dict[str, Tensor], c: TextConfig) -> list[float]:
    """Attention of the score token on each token before `block`, averaged over heads."""
    row = kinds.index(TokenKind.RESPONSE) - 1 if TokenKind.RESPONSE in kinds else len(kinds) - 1
    if isinstance(c, Qwen2Config):
        q, k = _qwen2_queries_and_keys(h, tokens, block, c)
    else:
        normed = _rms(h, block["norm.weight"], c.layer_norm_epsilon)
        q, k = (_heads(normed @ block[f"mixer.{name}_proj.weight"].t(), c.head_dim) for name in "qk")
    repeats = q.shape[1] // k.shape[1]
    total = torch.zeros(len(kinds), dtype=h.dtype)
    for head in range(q.shape[1]):
        logits = k[: row + 1, head // repeats] @ q[row, head] / math.sqrt(c.head_dim)
        total[: row + 1] += torch.softmax(logits, 0) / q.shape[1]
    return total.tolist()


def slow_importance(
    h: Tensor, tokens: list[int], kinds: list[int], block: dict[str, Tensor], c: TextConfig
) -> list[float]:
    """Mean share of each token in the reads of the instruction before the first response, over heads and queries."""
    end = kinds.index(TokenKind.RESPONSE) if TokenKind.RESPONSE in kinds else len(kinds)
    rows = [index for index in range(end) if kinds[index] == TokenKind.INSTRUCTION] or [max(0, end - 1)]
    if "mixer.in_proj.weight" not in block:
        total = [0.0] * len(kinds)
        for row in rows:  # attention of a score token that is `row`
            asked = [TokenKind.INSTRUCTION] * (row + 1) + [TokenKind.RESPONSE] * (len(kinds) - row - 1)
            total = [a + b for a, b in zip(total, slow_scores(h, tokens, asked, block, c), strict=True)]
        return [value / len(rows) for value in total]
    assert isinstance(c, HybridConfig)
    _, dt, B, C = _mamba_inputs(_rms(h, block["norm.weight"], c.layer_norm_epsilon), block, c, None)
    heads = range(c.mamba_num_heads)
    shares = torch.zeros(len(kinds), dtype=h.dtype)
    for row in rows:
        for head in heads:
            group = head // (c.mamba_num_heads // c.n_groups)
            weights = [
                float((C[row, group] @ B[j, group]).detach().abs() * dt[j, head].detach()) for j in range(row + 1)
            ]
            shares[: row + 1] += torch.tensor(weights, dtype=h.dtype) / sum(weights)
    return (shares / (len(rows) * len(heads))).tolist()


def slow_evs(sample: Sample, features: Tensor, tokens_per_frame: int, num_kept: int) -> list[int]:
    """Indices of the sample's tokens that EVS leaves."""
    change = {}
    rank = 0  # in its run of vision tokens
    for index, vision in enumerate(sample.vision_index):
        rank = rank + 1 if index and vision >= 0 and sample.vision_index[index - 1] >= 0 else 0
        if vision >= 0:
            first = vision - rank % tokens_per_frame - tokens_per_frame  # of the frame before
            before = range(first, first + tokens_per_frame) if rank >= tokens_per_frame else []
            cosines = [float(F.cosine_similarity(features[vision], features[other], dim=0)) for other in before]
            change[index] = 1 - max(cosines) if cosines else math.inf
    kept = sorted(change, key=lambda index: (-round(change[index], 12), index))[:num_kept]
    return [index for index, vision in enumerate(sample.vision_index) if vision < 0 or index in kept]


def _update(h: Tensor, kinds: list[int], sources: list[int], cross: dict[str, Tensor], c: TextConfig) -> Tensor:
    update = torch.zeros_like(h)
    receivers = [index for index, kind in enumerate(kinds) if kind == TokenKind.INSTRUCTION]
    if not receivers or not sources:
        return update
    zero = torch.zeros((), dtype=h.dtype)
    q, k, v = (
        _heads(h[indices] @ cross[f"{name}_proj.weight"].t() + cross.get(f"{name}_proj.bias", zero), c.head_dim)
        for name, indices in (("q", receivers), ("k", sources), ("v", sources))
    )
    earlier = torch.tensor([[source < receiver for source in sources] for receiver in receivers])
    mixed = _attend(q, k, v, earlier) @ cross["o_proj.weight"].t()
    update[receivers] = torch.tanh(cross["alpha"]) * mixed
    return update
