"""EngramLayer: adds memory vectors to the residual stream.

What it chooses: one key for every residual stream and one value for all; a gate from the RMS-normed products of stream
and key; an optional short causal convolution over the gated values, added to them. The demo, the paper, V4.1 and
Qwen4-Exp are settings of the configuration, not classes.
Promises: rows of zeros give exactly zero (without projection bias); dead positions get exactly zero. Never owns a table
or a cache.
Source: Engram (arXiv 2601.07372), sections 2.3 (gate, equations 3 to 5) and 2.4 (streams, equation 6).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_engram import EngramCacheLayer, with_front


# Below this the signed square root is constant, because its slope at 0 is infinite (the demo's value).
GATE_FLOOR = 1e-6


class Projection(nn.Module):
    """A linear map that is not an `nn.Linear`: quantisers replace those, and the memory must keep its precision."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(0.0, inputs**-0.5))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., inputs)` to `(..., outputs)`."""
        return F.linear(x, self.weight, self.bias)


class EngramLayer(GradientCheckpointingLayer):
    """Gate, key and value projections and convolution of one layer.

    Shapes: B batch, L length, M streams, D hidden size, E memory vector.

    Args:
        config ([`EngramConfig`]): sizes and variants.
        layer_id (`int`): decoder layer whose input it adds to, counted from 0.
    """

    def __init__(self, config, layer_id: int):
        super().__init__()
        hidden, streams = config.text_config.hidden_size, config.engram_hc_mult
        self.hidden_size, self.streams, self.gate = hidden, streams, config.engram_gate
        self.norm_eps, self.conv_norm_eps = config.engram_norm_eps, config.engram_conv_norm_eps
        self.key_std, self.value_std = config.engram_initializer_range, config.engram_value_initializer_range
        self.place = config.engram_layer_ids.index(layer_id)
        self.kernel_size, self.dilation = config.engram_kernel_size, config.engram_max_ngram_size
        self.norm_shift = float(config.engram_zero_centred_norms)  # what is added to the weights of norms
        self.across_documents = config.engram_conv_across_documents
        # Rows of the weight: M keys of D rows each, then the value's D rows (V4.1's `wkv`).
        self.key_value = Projection(config.engram_memory_dim, (streams + 1) * hidden, config.engram_projection_bias)
        norms = torch.full((streams, hidden), 1 - self.norm_shift)
        self.key_norm = nn.Parameter(norms.clone())
        self.query_norm = nn.Parameter(norms.clone())
        if self.kernel_size:
            self.conv_norm = nn.Parameter(norms)
            self.conv = nn.Parameter(torch.zeros(self.kernel_size, streams * hidden))

    @property
    def receptive_field(self) -> int:
        """Number of positions before a token that the convolution reads."""
        return max(0, self.kernel_size - 1) * self.dilation

    def forward(
        self,
        hidden_states: torch.Tensor,
        vectors: torch.Tensor,
        alive: torch.Tensor | None = None,
        cache: EngramCacheLayer | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes what the memory adds to the residual stream.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, streams, hidden)` or with the last two as one):
                The residual streams before the decoder layer.
            vectors (`torch.Tensor` of shape `(batch, length, orders * heads * width)`): rows read for each token.
            alive (`torch.BoolTensor` of shape `(batch, length)`, *optional*): False where the gate is shut.
            cache ([`EngramCacheLayer`], *optional*): convolution history, extended in place.
            segments (`torch.LongTensor` of shape `(batch, receptive_field or more + length)`, *optional*):
                Document number of each position; the convolution does not cross documents.

        Returns:
            `torch.Tensor` of the shape and dtype of `hidden_states`.
        """
        stream = hidden_states.reshape(*hidden_states.shape[:2], self.streams, self.hidden_size)  # (B, L, M, D)
        projected = self.key_value(vectors.to(self.key_value.weight.dtype))  # (B, L, (M + 1) * D)
        keys = projected[..., : -self.hidden_size].view(stream.shape)  # (B, L, M, D)
        value = projected[..., None, -self.hidden_size :].float()  # (B, L, 1, D)
        gate = self.open_gate(stream.float(), keys.float())  # (B, L, M, 1)
        if alive is not None:
            gate = gate * alive[:, :, None, None]
        gated = gate * value  # (B, L, M, D)
        if self.kernel_size:
            gated = gated + self.convolve(gated, alive, cache, segments)
        return gated.to(hidden_states.dtype).view(hidden_states.shape)

    def open_gate(self, stream: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Returns the gate `(B, L, M, 1)` from stream and keys of shape `(B, L, M, D)` in float32."""
        weight = self.norm_weight(self.query_norm) * self.norm_weight(self.key_norm)  # (M, D)
        score = (stream * keys * weight).sum(-1, keepdim=True) / math.sqrt(self.hidden_size)  # (B, L, M, 1)
        score = score * _rms_scale(stream, self.norm_eps) * _rms_scale(keys, self.norm_eps)
        if self.gate != "sigmoid":
            root = torch.copysign(score.abs().clamp(min=GATE_FLOOR).sqrt(), score)
            score = root if self.gate == "signed_sqrt" else root * (score != 0)
        return torch.sigmoid(score)

    def norm_weight(self, norm: nn.Parameter) -> torch.Tensor:
        """Returns the factors `(M, D)` of a norm, in float32."""
        return norm.float() + self.norm_shift if self.norm_shift else norm.float()

    def convolve(
        self,
        gated: torch.Tensor,
        alive: torch.Tensor | None,
        cache: EngramCacheLayer | None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Applies norm, causal depthwise convolution and SiLU to gated values `(B, L, M, D)`; zero where not alive."""
        batch, length = gated.shape[:2]
        normed = gated * _rms_scale(gated, self.conv_norm_eps) * self.norm_weight(self.conv_norm)
        inputs = normed.flatten(2)  # (B, L, M * D)
        if cache is not None and self.receptive_field:
            inputs = cache.extend_convolution(inputs, 1 + self.place, self.receptive_field)
        width = self.receptive_field + length
        window = with_front(inputs, width)[:, -width:]  # (B, receptive_field + L, M * D)
        mixed = torch.zeros_like(window[:, :length])  # (B, L, M * D)
        for step, weight in enumerate(self.conv.float()):
            start = step * self.dilation
            seen = window[:, start : start + length]  # (B, L, M * D)
            if segments is not None and not self.across_documents:
                back = segments.shape[1] - length - self.receptive_field + start
                seen = seen * (segments[:, back : back + length] == segments[:, -length:])[:, :, None]
            mixed += seen * weight
        added = F.silu(mixed).view(gated.shape)  # (B, L, M, D)
        return added if alive is None else added * alive[:, :, None, None]


def _rms_scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns the factor that scales the last dimension of `x` to root mean square 1; that dimension is kept as 1."""
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
