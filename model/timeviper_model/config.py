"""Model sizes and presets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

BlockType = Literal["mamba", "attention", "mlp"]
PATTERN_LETTERS: dict[str, BlockType] = {"M": "mamba", "*": "attention", "-": "mlp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridConfig:
    """Nemotron-H; field names as in NVIDIA's `config.json`."""

    hybrid_override_pattern: str
    """One letter per block: M = Mamba-2, * = attention, - = MLP."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the MLP blocks."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    """Groups sharing B and C; head h uses group h // (mamba_num_heads / n_groups)."""
    conv_kernel: int = 4
    use_conv_bias: bool = True
    chunk_size: int = 128
    layer_norm_epsilon: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    """Range of dt after softplus."""
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    """Minimum initial dt."""
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131072
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.hybrid_override_pattern) - set(PATTERN_LETTERS))
        if unknown or not self.hybrid_override_pattern:
            hint = "; expert blocks (E) are not supported" if "E" in unknown else ""
            raise ValueError(f"{self.hybrid_override_pattern = } may hold only M, * and -{hint}")
        for big, small in (
            ("num_attention_heads", "num_key_value_heads"),
            ("mamba_num_heads", "n_groups"),
            ("mamba_intermediate_size", "n_groups"),
        ):
            if getattr(self, big) % getattr(self, small):
                raise ValueError(f"{big} = {getattr(self, big)} must be a multiple of {small} = {getattr(self, small)}")

    @property
    def block_types(self) -> tuple[BlockType, ...]:
        return tuple(PATTERN_LETTERS[letter] for letter in self.hybrid_override_pattern)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def qkv_bias(self) -> bool:
        return False

    @property
    def mamba_intermediate_size(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        return self.mamba_intermediate_size + 2 * self.n_groups * self.ssm_state_size


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """RoPE for contexts longer than pretraining's (YaRN, arXiv 2309.00071); field names as in `rope_scaling`."""

    factor: float
    """Longest context, in lengths of pretraining."""
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    """Dimensions with more turns than this in the original context keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions with fewer turns are slowed by `factor`."""
    attention_factor: float | None = None
    """Factor of cos and sin; None = 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        if self.factor < 1.0 or self.original_max_position_embeddings < 1:
            raise ValueError(f"{self.factor = } and {self.original_max_position_embeddings = } must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen2Config:
    """Qwen2.5; field names as in its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """Decoder layers, as counted by a TransV site's `layer`."""
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float = 1_000_000.0
    rope_scaling: YarnScaling | None = None
    rms_norm_eps: float = 1e-6
    use_sliding_window: bool = False
    """Must be False: every layer attends to the whole sequence."""
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    bos_token_id: int = 151643
    eos_token_id: int | tuple[int, ...] = 151645
    pad_token_id: int = 151643

    def __post_init__(self) -> None:
        if self.use_sliding_window:
            raise ValueError("use_sliding_window = True is not supported: attention always covers the whole sequence")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads = } must be a multiple of {self.num_key_value_heads = }")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"{self.hidden_size = } must give {self.num_attention_heads = } heads of an even width")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        return True

    @property
    def block_types(self) -> tuple[BlockType, ...]:
        return tuple([PATTERN_LETTERS["*"]] * self.num_hidden_layers)


TextConfig = HybridConfig | Qwen2Config


def eos_token_ids(config: TextConfig) -> frozenset[int]:
    ids = config.eos_token_id
    return frozenset({ids} if isinstance(ids, int) else ids)


Select = Literal["uniform", "attention", "importance", "evs"]
"""Criteria for keeping vision tokens."""
PLAN_WORDS: dict[str, Select] = {"uni": "uniform", "attn": "attention", "imp": "importance", "evs": "evs"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TransVSite:
    """A site that drops vision tokens (paper section 3.3)."""

    layer: int
    """0-based index of the first block with fewer tokens."""
    select: Select
    """`uniform` in time; `attention` of the last token before the answer; `importance` for the instruction, at an
    attention or Mamba-2 block (after arXiv 2603.00198); `evs`, before the first block, for what differs most from the
    frame before (arXiv 2510.14624).
    """
    keep: float
    """Fraction of the ORIGINAL vision tokens to keep."""
    transfer: Literal["cross_attention", "none"] = "cross_attention"
    """`none` is plain token dropping (the paper's TD)."""
    transfer_from: Literal["dropped", "kept"] = "dropped"

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"{self.layer = } must be at least 0")
        if not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"{self.keep = } must be a fraction between 0 and 1")
        if self.select == "evs" and (self.layer or self.transfer != "none"):
            raise ValueError(
                f"evs selects before block 0 and has no transfer, not {self.layer = } and {self.transfer = }"
            )


def parse_transv_plan(text: str) -> tuple[TransVSite, ...]:
    """Parses the paper's layers and DROP rates, `uni_7_0.5-attn_39_0.9`; `imp` and `evs` sites have no transfer."""
    sites = []
    for site in filter(None, text.split("-")):
        match = re.fullmatch(rf"({'|'.join(PLAN_WORDS)})_(\d+)_(0(?:\.\d+)?|1(?:\.0+)?)", site)
        if match is None:
            raise ValueError(
                f"{site!r} in {text!r} is not ({'|'.join(PLAN_WORDS)})_LAYER_DROPRATE; the last number is the fraction"
                " dropped, so uni_7_0.5 keeps half"
            )
        select = PLAN_WORDS[match[1]]
        sites.append(
            TransVSite(
                layer=int(match[2]),
                select=select,
                keep=round(1.0 - float(match[3]), 12),
                transfer="cross_attention" if select in ("uniform", "attention") else "none",
            )
        )
    return tuple(sites)


def pyramid_drop(text: TextConfig) -> tuple[TransVSite, ...]:
    """PyramidDrop (arXiv 2410.17247): every attention block keeps half of its vision tokens, without transfer."""
    layers = [layer for layer, kind in enumerate(text.block_types) if kind == "attention"]
    return tuple(
        TransVSite(layer=layer, select="attention", keep=0.5**count, transfer="none")
        for count, layer in enumerate(layers, start=1)
    )


def progressive_importance(text: TextConfig, keep: float) -> tuple[TransVSite, ...]:
    """Drops equal parts before every attention and Mamba-2 block but the first, down to `keep` (arXiv 2603.00198)."""
    layers = [layer for layer, kind in enumerate(text.block_types) if kind != "mlp"][1:]
    return tuple(
        TransVSite(
            layer=layer,
            select="importance",
            keep=round(1.0 - (1.0 - keep) * step / len(layers), 12),
            transfer="none",
        )
        for step, layer in enumerate(layers, start=1)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """Vision tower that produced the features."""

    encoder: str = "google/siglip-so400m-patch14-384"
    """Hugging Face name or local folder."""
    layer: int = -2
    """Index into hidden_states; -2 is the second-to-last block's output."""
    num_tokens_per_frame: int = 16
    merge_heads: int = 16
    """Heads into which ToMe splits features for similarity."""
    hidden_size: int = 1152
    second: VisionConfig | None = None
    """Second tower over the same frames."""

    def __post_init__(self) -> None:
        if self.second is not None and self.second.second is not None:
            raise ValueError("vision.second.second is set; at most two vision towers are supported")

    @property
    def row_size(self) -> int:
        """Width of feature rows: the wider tower's."""
        return self.hidden_size if self.second is None else max(self.hidden_size, self.second.hidden_size)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of both towers."""
        return self.num_tokens_per_frame + (0 if self.second is None else self.second.num_tokens_per_frame)


ChatTemplateName = Literal["nemotron", "chatml", "tokenizer"]
"""The paper's templates, or the tokenizer's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeViperConfig:
    text: TextConfig
    vision: VisionConfig = field(default_factory=VisionConfig)
    transv: tuple[TransVSite, ...] = ()
    chat_template: ChatTemplateName = "nemotron"

    def __post_init__(self) -> None:
        layers = [site.layer for site in self.transv]
        if layers != sorted(set(layers)):
            raise ValueError(f"TransV sites must be in ascending order of distinct layers, not {layers}")
        blocks = self.text.block_types
        for site in self.transv:
            if site.layer >= len(blocks):
                raise ValueError(f"TransV {site.layer = } is past the last of {len(blocks)} blocks")
            if site.select == "attention" and blocks[site.layer] != "attention":
                attention_layers = [layer for layer, block in enumerate(blocks) if block == "attention"]
                raise ValueError(
                    f"TransV selects by attention at layer {site.layer}, which is a {blocks[site.layer]} block;"
                    f" attention blocks are at {attention_layers}"
                )
            if site.select == "importance" and blocks[site.layer] == "mlp":
                raise ValueError(
                    f"TransV selects by importance at layer {site.layer}, an MLP block; choose attention or Mamba-2"
                )
            if site.transfer == "cross_attention" and "attention" not in blocks:
                raise ValueError("TransV starts as a copy of an attention block, but this pattern has none")


def with_text(text: TextConfig, base: TimeViperConfig | None = None) -> TimeViperConfig:
    """Returns `base` with another language model; without a base, the default tower and no TransV site.

    Raises:
        ValueError: if the TransV sites of `base` do not fit.
    """
    template: ChatTemplateName = "nemotron" if isinstance(text, HybridConfig) else "chatml"
    if base is None:
        return TimeViperConfig(text=text, chat_template=template)
    same_family = type(base.text) is type(text)
    return replace(base, text=text, chat_template=base.chat_template if same_family else template)


NEMOTRON_NANO_9B_V2 = HybridConfig(
    hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    vocab_size=131072,
    hidden_size=4480,
    intermediate_size=15680,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    ssm_state_size=128,
    n_groups=8,
)

QWEN2_5_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)

PAPER_PLAN = parse_transv_plan("uni_7_0.5-attn_39_0.9")

TINY = TimeViperConfig(
    text=HybridConfig(
        hybrid_override_pattern="M-M*-M-M*-",
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=32,
        n_groups=2,
        chunk_size=32,
        # at the 9B's 0.02 the projector does not align; at 1 / sqrt(hidden_size) the model does not learn seconds
        initializer_range=0.045,
    ),
    vision=VisionConfig(encoder="tiny", num_tokens_per_frame=4, merge_heads=4, hidden_size=64),
    transv=(
        TransVSite(layer=3, select="uniform", keep=0.5),
        TransVSite(layer=8, select="attention", keep=0.25),
    ),
)

TINY_QWEN = TimeViperConfig(
    text=Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=10_000.0,
        initializer_range=TINY.text.initializer_range,
        bos_token_id=1,
        eos_token_id=12,
        pad_token_id=0,
    ),
    vision=TINY.vision,
    transv=(
        TransVSite(layer=1, select="uniform", keep=0.5),
        TransVSite(layer=4, select="attention", keep=0.25),
    ),
    chat_template="nemotron",  # matches the special tokens of the synthetic corpus' tokenizer
)

PRESETS: dict[str, TimeViperConfig] = {
    "tiny": TINY,
    "9b": TimeViperConfig(text=NEMOTRON_NANO_9B_V2, transv=PAPER_PLAN),
    "tiny-qwen": TINY_QWEN,
    "qwen2.5-7b": TimeViperConfig(text=QWEN2_5_7B, chat_template="chatml"),
    "tiny-pdrop": replace(TINY, transv=pyramid_drop(TINY.text)),
    "tiny-importance": replace(TINY, transv=progressive_importance(TINY.text, 0.25)),
    "9b-importance": TimeViperConfig(
        text=NEMOTRON_NANO_9B_V2, transv=progressive_importance(NEMOTRON_NANO_9B_V2, 0.25)
    ),
    "9b-pdrop": TimeViperConfig(text=NEMOTRON_NANO_9B_V2, transv=pyramid_drop(NEMOTRON_NANO_9B_V2)),
}
"""`qwen` is the paper's Transformer backbone, `pdrop` and `importance` use these instead of TransV."""
