"""Qwen3.5 with its MTP head in plain torch, with the tensor names of Hugging Face.

The mathematics is that of transformers' `modeling_qwen3_5` and, for the recurrence, of
"Gated Delta Networks" (arXiv 2412.06464) in its chunked form.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .rounding import Embedding, Linear

CHUNK = 64


@dataclass(frozen=True)
class Shape:
    """The model's dimensions, under the names of its config.json."""

    vocab_size: int = 6144
    hidden_size: int = 384
    intermediate_size: int = 960
    num_hidden_layers: int = 8
    full_attention_interval: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


class RMSNorm(nn.Module):
    """RMS norm with a zero-centred weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.eps) * (1 + self.weight)


class GatedRMSNorm(nn.Module):
    """RMS norm with a plain weight, multiplied by the SiLU of a gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return _rms_norm(x, self.eps) * self.weight * functional.silu(gate.float())


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner, outer = shape.intermediate_size, shape.hidden_size
        self.gate_proj = Linear(outer, inner)
        self.up_proj = Linear(outer, inner)
        self.down_proj = Linear(inner, outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Full attention with normed, partly rotated queries and keys, gated output."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size, dim = shape.hidden_size, shape.head_dim
        self.shape = shape
        self.q_proj = Linear(size, 2 * shape.num_attention_heads * dim)
        self.k_proj = Linear(size, shape.num_key_value_heads * dim)
        self.v_proj = Linear(size, shape.num_key_value_heads * dim)
        self.o_proj = Linear(shape.num_attention_heads * dim, size)
        self.q_norm = RMSNorm(dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(dim, shape.rms_norm_eps)

    def project(
        self, x: Tensor, first_position: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys, values [B, heads, T, dim] and the gate [B, T, ...]."""
        batch, length, _ = x.shape
        shape = self.shape
        heads = self.q_proj(x).view(batch, length, shape.num_attention_heads, -1)
        query, gate = heads.chunk(2, dim=-1)
        keys = self.k_proj(x).view(batch, length, shape.num_key_value_heads, -1)
        values = self.v_proj(x).view(batch, length, shape.num_key_value_heads, -1)
        angles = _rotary_angles(shape, first_position, length, x.device)
        query = _rotate(self.q_norm(query), *angles).to(values.dtype)
        keys = _rotate(self.k_norm(keys), *angles).to(values.dtype)
        num_groups = shape.num_attention_heads // shape.num_key_value_heads
        keys, values = (
            part.transpose(1, 2).repeat_interleave(num_groups, dim=1)
            for part in (keys, values)
        )
        return query.transpose(1, 2), keys, values, gate.reshape(batch, length, -1)

    def output(self, attended: Tensor, gate: Tensor) -> Tensor:
        """Gate and project what attention returned, [B, heads, T, dim]."""
        merged = attended.transpose(1, 2).flatten(2)
        return self.o_proj(merged * gate.sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        query, keys, values, gate = self.project(x, 0)
        attended = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True
        )
        return self.output(attended, gate)


class GatedDeltaNet(nn.Module):
    """The linear-attention block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        size, num_values = shape.hidden_size, shape.linear_num_value_heads
        self.key_dim = shape.linear_num_key_heads * shape.linear_key_head_dim
        self.value_dim = num_values * shape.linear_value_head_dim
        conv_dim = 2 * self.key_dim + self.value_dim
        self.in_proj_qkv = Linear(size, conv_dim)
        self.in_proj_z = Linear(size, self.value_dim)
        self.in_proj_b = Linear(size, num_values)
        self.in_proj_a = Linear(size, num_values)
        kernel = shape.linear_conv_kernel_dim
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, kernel, groups=conv_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(num_values))
        self.A_log = nn.Parameter(torch.zeros(num_values))
        self.norm = GatedRMSNorm(shape.linear_value_head_dim, shape.rms_norm_eps)
        self.out_proj = Linear(self.value_dim, size)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = self.shape
        mixed = functional.silu(self._convolve(self.in_proj_qkv(x).float()))
        query, key, value = mixed.split(
            [self.key_dim, self.key_dim, self.value_dim], dim=-1
        )
        query = query.unflatten(-1, (-1, shape.linear_key_head_dim))
        key = key.unflatten(-1, (-1, shape.linear_key_head_dim))
        value = value.unflatten(-1, (-1, shape.linear_value_head_dim))
        num_groups = shape.linear_num_value_heads // shape.linear_num_key_heads
        query, key = (
            (
                part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
            ).repeat_interleave(num_groups, dim=2)
            for part in (query, key)
        )
        time_step = functional.softplus(self.in_proj_a(x).float() + self.dt_bias)
        with torch.autocast(x.device.type, enabled=False):
            mixed = gated_delta_rule(
                query * shape.linear_key_head_dim**-0.5,
                key,
                value,
                -self.A_log.exp() * time_step,
                self.in_proj_b(x).float().sigmoid(),
            )
        gate = self.in_proj_z(x).view(batch, length, shape.linear_num_value_heads, -1)
        return self.out_proj(self.norm(mixed, gate).flatten(2))

    def _convolve(self, x: Tensor) -> Tensor:
        # Four shifted products compile to one kernel, a depthwise conv1d does not.
        weight = self.conv1d.weight[:, 0]
        width, length = weight.shape[1], x.shape[1]
        padded = functional.pad(x, (0, 0, width - 1, 0))
        taps = [padded[:, i : i + length] * weight[:, i] for i in range(width)]
        return torch.stack(taps).sum(0)


class DecoderLayer(nn.Module):
    """A transformer layer with either kind of attention."""

    def __init__(self, shape: Shape, *, is_linear: bool) -> None:
        super().__init__()
        if is_linear:
            self.linear_attn = GatedDeltaNet(shape)
        else:
            self.self_attn = Attention(shape)
        self.mixer = "linear_attn" if is_linear else "self_attn"
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + getattr(self, self.mixer)(self.input_layernorm(x))
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half of the layer."""
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """The language model without its output projection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, is_linear=(i + 1) % shape.full_attention_interval != 0)
            for i in range(shape.num_hidden_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class MTPHead(nn.Module):
    """The multi-token-prediction head, arXiv 2412.19437 section 2.2 in Qwen's form."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size, eps = shape.hidden_size, shape.rms_norm_eps
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(size, eps)
        self.pre_fc_norm_hidden = RMSNorm(size, eps)
        self.layers = nn.ModuleList([DecoderLayer(shape, is_linear=False)])
        self.norm = RMSNorm(size, eps)

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Draft one token ahead at every position.

        Args:
            embeddings (Tensor): Of the tokens after each position, [B, T, D].
            hidden (Tensor): The trunk's output at each position, [B, T, D].

        Returns:
            Tensor: Hidden states for the output projection, [B, T, D].
        """
        return self.norm(self.layers[0](self._mix(embeddings, hidden)))

    def chain(
        self, embeddings: Tensor, hidden: Tensor, first: Tensor, num_more: int
    ) -> list[Tensor]:
        """Draft further tokens at every position, as decoding does.

        Row p sees the first step's keys of rows 0 to p, which come from the trunk's
        hidden states, and the keys of its own later steps, which come from the head's.

        Args:
            embeddings (Tensor): Of the tokens after each position,
                [B, T + num_more, D].
            hidden (Tensor): The trunk's output at each position, [B, T, D].
            first (Tensor): What the first step returned, [B, T, D].
            num_more (int): How many drafts are made after the first.

        Returns:
            list: Hidden states for the output projection, [B, T, D] for each draft.
        """
        layer, length = self.layers[0], hidden.shape[1]
        attention = layer.self_attn
        committed = layer.input_layernorm(self._mix(embeddings[:, :length], hidden))
        _, keys, values, _ = attention.project(committed, 0)
        own: list[tuple[Tensor, Tensor]] = []
        states = [first]
        for i in range(1, num_more + 1):
            x = self._mix(embeddings[:, i : length + i], states[-1])
            query, *own_kv, gate = attention.project(layer.input_layernorm(x), i)
            own.append((own_kv[0], own_kv[1]))
            x = x + attention.output(_attend_chain(query, keys, values, own), gate)
            states.append(self.norm(layer.feed_forward(x)))
        return states[1:]

    def _mix(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        parts = self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)
        return self.fc(torch.cat(parts, dim=-1))


def _attend_chain(
    query: Tensor, keys: Tensor, values: Tensor, own: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Let row p see keys up to p and its own ones, all [B, heads, T, dim]."""
    scale = query.shape[-1] ** -0.5
    scores = query @ keys.mT * scale
    is_future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    own_scores = [(query * key).sum(-1, keepdim=True) * scale for key, _ in own]
    scores = torch.cat(
        [scores.masked_fill(is_future, float("-inf")), *own_scores], dim=-1
    )
    weights = scores.float().softmax(-1).to(values.dtype)
    num_keys = keys.shape[2]
    attended = weights[..., :num_keys] @ values
    for i, (_, value) in enumerate(own, start=num_keys):
        attended = attended + weights[..., i : i + 1] * value
    return attended


class Qwen35(nn.Module):
    """Trunk and head, named so that their tensors only need a prefix on export."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self.mtp = MTPHead(shape)
        _initialise(self, seed)

    def project(self, hidden: Tensor) -> Tensor:
        """Return logits through the tied embedding."""
        return self.model.embed_tokens.project(hidden)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor
) -> Tensor:
    """Run the gated delta rule over whole sequences, a chunk at a time.

    Args:
        query (Tensor): Scaled, [B, T, H, K].
        key (Tensor): Of unit length, [B, T, H, K].
        value (Tensor): [B, T, H, V].
        log_decay (Tensor): Logarithm of the state's decay, at most 0, [B, T, H].
        beta (Tensor): Write strength, 0 to 1, [B, T, H].

    Returns:
        Tensor: What the state returns for each query, [B, T, H, V].
    """
    length = query.shape[1]
    query, key, value = (_into_chunks(part) for part in (query, key, value))
    log_decay, beta = (
        _into_chunks(part[..., None])[..., 0] for part in (log_decay, beta)
    )
    total = log_decay.cumsum(-1)
    ones = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device)
    span = total[..., :, None] - total[..., None, :]
    decay = span.masked_fill(ones.triu(1), float("-inf")).exp()
    overlap = (key @ key.mT) * decay * beta[..., None]
    inverse = _inverse_unit_lower(overlap.masked_fill(ones.triu(), 0.0))
    written = inverse @ (value * beta[..., None])
    erased = inverse @ (key * (beta * total.exp())[..., None])
    tail = (key * (total[..., -1:] - total).exp()[..., None]).mT
    identity = torch.eye(key.shape[-1], device=key.device)
    kept = identity * total[..., -1:, None].exp() - tail @ erased
    states = _scan(kept, tail @ written)
    outputs = (query * total.exp()[..., None]) @ states
    outputs = outputs + ((query @ key.mT) * decay) @ (written - erased @ states)
    return outputs.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _scan(kept: Tensor, added: Tensor) -> Tensor:
    """Return the state before every chunk: s[i + 1] = kept[i] s[i] + added[i]."""
    state = torch.zeros_like(added[:, :, 0])
    states = []
    for i in range(added.shape[2]):
        states.append(state)
        state = kept[:, :, i] @ state + added[:, :, i]
    return torch.stack(states, dim=2)


def _into_chunks(x: Tensor) -> Tensor:
    padding = -x.shape[1] % CHUNK
    x = functional.pad(x, (0, 0, 0, 0, 0, padding)).transpose(1, 2)
    return x.unflatten(2, (-1, CHUNK)).contiguous()


def _inverse_unit_lower(strictly_lower: Tensor) -> Tensor:
    """Invert I + L by doubling the size of the blocks that are already inverted.

    A Neumann series has the same cost but overflows when keys resemble each other.
    """
    size = strictly_lower.shape[-1]
    index = torch.arange(size, device=strictly_lower.device)
    identity = torch.eye(size, device=strictly_lower.device)
    with torch.no_grad():
        inverse = identity.expand_as(strictly_lower)
        block = 1
        while block < size:
            is_pair = index[:, None] // (2 * block) == index // (2 * block)
            is_joint = is_pair & (index[:, None] // block != index // block)
            joint = strictly_lower * is_joint
            inverse = inverse - inverse @ joint @ inverse
            block *= 2
    # One Newton step leaves the value as it is and carries the whole gradient.
    residual = inverse + strictly_lower @ inverse - identity
    return inverse - inverse @ residual


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _rotary_angles(
    shape: Shape, first_position: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    half = torch.arange(0, shape.rotary_dim, 2, device=device)
    frequencies = shape.rope_theta ** (-half / shape.rotary_dim)
    positions = torch.arange(first_position, first_position + length, device=device)
    angles = positions[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(rotated, dim=-1)


@torch.no_grad()
def _initialise(model: Qwen35, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    depth_scale = (2 * model.shape.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_(0, 0.02, generator=generator)
        elif parameter.ndim == 2:
            parameter.normal_(0, 0.6 * parameter.shape[1] ** -0.5, generator=generator)
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                parameter.mul_(depth_scale)
        elif parameter.ndim == 3:
            parameter.uniform_(-0.5, 0.5, generator=generator)
        elif name.endswith("dt_bias"):
            # softplus(dt_bias) is log-uniform from 0.001 to 0.1, as in Mamba-2.
            step = parameter.uniform_(-6.9, -2.3, generator=generator).exp()
            parameter.copy_(step + (-torch.expm1(-step)).log())
        elif name.endswith("A_log"):
            parameter.uniform_(1, 16, generator=generator).log_()
