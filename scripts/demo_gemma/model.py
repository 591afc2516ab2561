"""Gemma-4 and its assistant in plain torch, with the tensor names of Hugging Face.

The mathematics is that of transformers' `modeling_gemma4`, for text alone, and of
`modeling_gemma4_assistant`, for all positions of a sequence at once.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
from demo_model.rounding import Embedding, Linear
from torch import Tensor, nn
from torch.nn import functional

FULL, SLIDING = "full_attention", "sliding_attention"
# Keys and values by type of layer, [B, heads, T, dim] each.
SharedKV = dict[str, tuple[Tensor, Tensor]]

# The assistant's query is at the position of the token whose keys and values are
# missing, one after the last that it sees, and sees one entry beyond the window.
_QUERY_POSITION = 1
_NUM_BEYOND_WINDOW = 1


@dataclass(frozen=True)
class Shape:
    """The dimensions of either model, under the names of its config.json."""

    hidden_size: int = 384
    intermediate_size: int = 960
    layer_types: tuple[str, ...] = 2 * (3 * (SLIDING,) + (FULL,))
    num_kv_shared_layers: int = 2
    vocab_size: int = 6144
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 64
    global_head_dim: int = 128
    sliding_window: int = 256
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = 30.0

    @property
    def num_hidden_layers(self) -> int:
        """How many layers there are."""
        return len(self.layer_types)


TARGET = Shape()
ASSISTANT = Shape(
    hidden_size=256,
    intermediate_size=640,
    layer_types=(SLIDING, FULL),
    num_kv_shared_layers=2,
    final_logit_softcapping=None,
)
# Base of the rotation and part of a head that is rotated, by type of layer.
ROTATIONS = {SLIDING: (1e4, 1.0), FULL: (1e6, 0.25)}


class RMSNorm(nn.Module):
    """RMS norm with a plain weight."""

    def __init__(self, size: int, eps: float, initial: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), initial))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.eps) * self.weight


class MLP(nn.Module):
    """GeGLU feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner, outer = shape.intermediate_size, shape.hidden_size
        self.gate_proj = Linear(outer, inner)
        self.up_proj = Linear(outer, inner)
        self.down_proj = Linear(inner, outer)

    def forward(self, x: Tensor) -> Tensor:
        gate = functional.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class Attention(nn.Module):
    """Attention with normed queries, keys and values, and no scale.

    Args:
        shape (Shape): The model's dimensions.
        layer_type (str): Says what is visible, how wide heads are and how they rotate.
        has_kv (bool): Whether it has keys and values of its own.
    """

    def __init__(self, shape: Shape, layer_type: str, *, has_kv: bool) -> None:
        super().__init__()
        dim = shape.head_dim if layer_type == SLIDING else shape.global_head_dim
        size, num_heads = shape.hidden_size, shape.num_attention_heads
        kv_size = shape.num_key_value_heads * dim
        self.layer_type, self.has_kv, self.head_dim = layer_type, has_kv, dim
        self.window, self.eps = shape.sliding_window, shape.rms_norm_eps
        self.num_groups = num_heads // shape.num_key_value_heads
        # The learned norms are all that scales the scores.
        norms = {"size": dim, "eps": self.eps, "initial": dim**-0.25}
        self.q_proj = Linear(size, num_heads * dim)
        self.o_proj = Linear(num_heads * dim, size)
        self.q_norm = RMSNorm(**norms)
        if has_kv:
            self.k_proj = Linear(size, kv_size)
            self.v_proj = Linear(size, kv_size)
            self.k_norm = RMSNorm(**norms)

    def forward(
        self, x: Tensor, kv: tuple[Tensor, Tensor] | None, first_position: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query = self._rotate(self.q_norm(self._heads(self.q_proj(x))), first_position)
        num_visible = self.window
        if kv is None:
            keys = self._rotate(self.k_norm(self._heads(self.k_proj(x))), 0)
            values = self._heads(self.v_proj(x))
            kv = keys.to(values.dtype), _rms_norm(values, self.eps).to(values.dtype)
        elif first_position:
            num_visible += _NUM_BEYOND_WINDOW
        query = query.to(kv[1].dtype)
        keys, values = (part.repeat_interleave(self.num_groups, dim=1) for part in kv)
        if self.layer_type == SLIDING:
            attended = _attend_window(query, keys, values, self.window, num_visible)
        else:
            attended = functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=1.0
            )
        return self.o_proj(attended.transpose(1, 2).flatten(2)), kv

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotate(self, x: Tensor, first_position: int) -> Tensor:
        """Rotate [B, heads, T, dim]; dimension i goes with i + dim / 2."""
        base, share = ROTATIONS[self.layer_type]
        half = self.head_dim // 2
        index = torch.arange(half, device=x.device)
        frequencies = base ** (-index / half) * (index < share * half)
        last_position = first_position + x.shape[2]
        positions = torch.arange(first_position, last_position, device=x.device)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second = x.chunk(2, dim=-1)
        rotated = first * cos - second * sin, second * cos + first * sin
        return torch.cat(rotated, dim=-1)


class DecoderLayer(nn.Module):
    """A transformer layer with norms before and after each of its halves."""

    def __init__(self, shape: Shape, layer_type: str, *, has_kv: bool) -> None:
        super().__init__()
        size, eps = shape.hidden_size, shape.rms_norm_eps
        # So the embedding and the sum of all halves begin with about the same size.
        small = (2 * shape.num_hidden_layers) ** -0.5
        self.self_attn = Attention(shape, layer_type, has_kv=has_kv)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps, small)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps, small)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self,
        x: Tensor,
        kv: tuple[Tensor, Tensor] | None = None,
        first_position: int = 0,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the layer on keys and values of its own, or on those that are given.

        Args:
            x (Tensor): [B, T, D].
            kv (tuple, optional): Keys and values, [B, heads, T, dim].
            first_position (int): Of the queries.

        Returns:
            tuple: The output, [B, T, D], and the keys and values.
        """
        y, kv = self.self_attn(self.input_layernorm(x), kv, first_position)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        x = x + self.post_feedforward_layernorm(y)
        return x * self.layer_scalar, kv


class Gemma4(nn.Module):
    """The language model."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        num_own = shape.num_hidden_layers - shape.num_kv_shared_layers
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, layer_type, has_kv=i < num_own)
            for i, layer_type in enumerate(shape.layer_types)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        _initialise(self, seed)

    def forward(self, tokens: Tensor) -> tuple[Tensor, SharedKV]:
        """Return the states after the last norm, [B, T, D], and what is shared."""
        x = self.embed(tokens)
        shared: SharedKV = {}
        for layer, layer_type in zip(self.layers, self.shape.layer_types, strict=True):
            kv = None if layer.self_attn.has_kv else shared[layer_type]
            x, shared[layer_type] = layer(x, kv)
        return self.norm(x), shared

    def embed(self, tokens: Tensor) -> Tensor:
        """Return scaled embeddings, [..., D]."""
        return self.embed_tokens(tokens) * self.shape.hidden_size**0.5

    def project(self, hidden: Tensor) -> Tensor:
        """Return logits through the tied embedding, with the cap."""
        cap = self.shape.final_logit_softcapping
        logits = self.embed_tokens.project(hidden).float()
        return logits if cap is None else cap * torch.tanh(logits / cap)


class Assistant(nn.Module):
    """The drafter: reads its model's states, keys and values, and has no own.

    Args:
        shape (Shape): Its dimensions.
        backbone_size (int): The hidden size of the model it drafts for.
        seed (int): Of the initial weights.
    """

    def __init__(self, shape: Shape, backbone_size: int, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        size = shape.hidden_size
        self.pre_projection = nn.Linear(2 * backbone_size, size, bias=False)
        self.post_projection = nn.Linear(size, backbone_size, bias=False)
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(shape.vocab_size, size)
        self.model.layers = nn.ModuleList(
            DecoderLayer(shape, layer_type, has_kv=False)
            for layer_type in shape.layer_types
        )
        self.model.norm = RMSNorm(size, shape.rms_norm_eps)
        _initialise(self, seed)

    def forward(
        self, embeddings: Tensor, hidden: Tensor, shared: SharedKV
    ) -> tuple[Tensor, Tensor]:
        """Run one draft step at every position; row p sees entries up to p.

        Args:
            embeddings (Tensor): Of each row's last token, scaled, [B, T, backbone].
            hidden (Tensor): The model's states, or what the last step returned, of the
                same shape.
            shared (dict): The model's keys and values.

        Returns:
            tuple: Logits, [B, T, vocabulary], and states for the next step.
        """
        x = self.pre_projection(torch.cat([embeddings, hidden], dim=-1)).float()
        layers = zip(self.model.layers, self.shape.layer_types, strict=True)
        for layer, layer_type in layers:
            x, _ = layer(x, shared[layer_type], _QUERY_POSITION)
        x = self.model.norm(x)
        logits = self.model.embed_tokens.project(x).float()
        return logits, self.post_projection(x).float()


def _attend_window(
    query: Tensor, keys: Tensor, values: Tensor, block: int, num_visible: int
) -> Tensor:
    """Let each row see the last entries up to its own, [B, heads, T, dim].

    Rows are taken in blocks, which see themselves and the block before.
    """
    length = query.shape[2]
    query, keys, values = (
        functional.pad(x, (0, 0, 0, -length % block)).unflatten(2, (-1, block))
        for x in (query, keys, values)
    )
    keys, values = (
        torch.cat([functional.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x], dim=-2)
        for x in (keys, values)
    )
    column = torch.arange(2 * block, device=query.device)
    row = column[block:, None]
    is_visible = (column <= row) & (column > row - num_visible)
    is_first = torch.arange(query.shape[2], device=query.device)[:, None, None] == 0
    is_visible = is_visible & ~(is_first & (column < block))
    scores = (query @ keys.mT).float().masked_fill(~is_visible, float("-inf"))
    attended = scores.softmax(-1).to(values.dtype) @ values
    return attended.flatten(2, 3)[:, :, :length]


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


@torch.no_grad()
def _initialise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
