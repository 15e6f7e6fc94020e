"""Rotary decoders of `transformers` by plain tensor calls over their own weights, without gradient.

In a small model the modules and wrappers of a forward pass, and the copies that they make, take a good part of its
time; and it carries every place to the end, asked for or not. Here is what that pass does, in its order and to the same
bits on a CPU, and nothing around it: `hidden_at` reads whole documents, `generation.stepping` adds tokens to them.

Under autocast, matrices are rounded once, where the weights are read; the library's pass, without gradient, rounds each
again at every call.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

FAMILIES = ("Llama", "Qwen2", "Qwen3")
PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
LIBRARY = "transformers."
GENERAL = {nn.Embedding, nn.Linear, nn.ModuleList}
ACTIVATION = "SiLUActivation"
LENGTH_CHANGES_ROTATION = ("dynamic", "longrope")


def is_plain(model: Any) -> bool:
    """Whether the passes over its weights do for ``model`` what its own forward pass does.

    Every module has to be one that the library builds for these families: no adapter, no quantised or sharded part, no
    other ``forward``, and no hook, which would not be called. All layers attend to everything before.
    """
    family = type(model).__name__.removesuffix("ForCausalLM")
    if family not in FAMILIES or getattr(model, "tp_size", None) is not None:
        return False
    config = model.config
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return False
    if config.rope_parameters["rope_type"] in LENGTH_CHANGES_ROTATION:
        return False
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return False
    return all(_is_plain(module, family) for module in model.modules())


def _is_plain(module: nn.Module, family: str) -> bool:
    kind = type(module)
    if kind not in GENERAL:
        known = kind.__name__ == ACTIVATION or kind.__name__ in [family + part for part in PARTS]
        if not known or not kind.__module__.startswith(LIBRARY):
            return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


# -- its weights ------------------------------------------------------------------------------------------------------

Matrix = tuple[Tensor, Tensor | None]  # weight [out, in] and bias
Norm = tuple[Tensor, float]  # gain and epsilon
Turn = tuple[Tensor, Tensor]  # cosines, and sines whose first half is negated


@dataclass(slots=True)
class Layer:
    """One layer's weights as they are now. A module's attributes take longer to look up than to read here."""

    before: Norm
    query: Matrix
    key: Matrix
    value: Matrix
    out: Matrix
    after: Norm
    gate: Matrix
    up: Matrix
    down: Matrix
    query_norm: Norm | None
    key_norm: Norm | None

    @classmethod
    def of(cls, layer: Any) -> "Layer":
        attention, mlp = layer.self_attn, layer.mlp
        has_norms = hasattr(attention, "q_norm")
        return cls(
            before=_norm(layer.input_layernorm),
            query=_matrix(attention.q_proj),
            key=_matrix(attention.k_proj),
            value=_matrix(attention.v_proj),
            out=_matrix(attention.o_proj),
            after=_norm(layer.post_attention_layernorm),
            gate=_matrix(mlp.gate_proj),
            up=_matrix(mlp.up_proj),
            down=_matrix(mlp.down_proj),
            query_norm=_norm(attention.q_norm) if has_norms else None,
            key_norm=_norm(attention.k_norm) if has_norms else None,
        )

    def heads(self, hidden_XC: Tensor, turn: Turn, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys at their places' angles, and values, [..., heads, width], of normed hidden states."""
        shape = (*hidden_XC.shape[:-1], -1, width)
        query_XHD = F.linear(hidden_XC, *self.query).view(shape)
        key_XHD = F.linear(hidden_XC, *self.key).view(shape)
        if self.query_norm is not None and self.key_norm is not None:
            query_XHD, key_XHD = normed(query_XHD, *self.query_norm), normed(key_XHD, *self.key_norm)
        value_XHD = F.linear(hidden_XC, *self.value).view(shape)
        return _turned(query_XHD, *turn), _turned(key_XHD, *turn), value_XHD

    def finished(self, hidden_XC: Tensor, mixed_XC: Tensor) -> Tensor:
        """The layer's hidden states, of those before it and what its heads have mixed."""
        hidden_XC = hidden_XC + F.linear(mixed_XC, *self.out)
        normed_XC = normed(hidden_XC, *self.after)
        gated_XC = F.silu(F.linear(normed_XC, *self.gate), inplace=True).mul_(F.linear(normed_XC, *self.up))
        return hidden_XC + F.linear(gated_XC, *self.down)


@dataclass(slots=True)
class Decoder:
    """A model's weights as they are now, layer by layer.

    width  of a head
    scale  of its scores
    """

    embedding_VC: Tensor
    layers: list[Layer]
    norm: Norm
    head: Matrix
    width: int
    scale: float

    @classmethod
    def of(cls, model: Any) -> "Decoder":
        decoder = model.model
        attention = decoder.layers[0].self_attn
        return cls(
            embedding_VC=decoder.embed_tokens.weight,
            layers=[Layer.of(layer) for layer in decoder.layers],
            norm=_norm(decoder.norm),
            head=_matrix(model.lm_head),
            width=attention.head_dim,
            scale=attention.scaling,
        )


def turn_of(model: Any, length: int) -> Turn:
    """Of the places from 0 to ``length``, each [length, D]."""
    embedding_VC = model.model.embed_tokens.weight
    place_1T = torch.arange(length, device=embedding_VC.device)[None]
    cos_1TD, sin_1TD = model.model.rotary_emb(embedding_VC[:1], place_1T)
    half = sin_1TD.shape[-1] // 2
    return cos_1TD[0], torch.cat([-sin_1TD[0, :, :half], sin_1TD[0, :, half:]], -1)


def normed(input: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """In float32 up to the gain, as the library's norms are; torch's own norm goes on in the input's precision."""
    if input.dtype == gain.dtype == torch.float32:
        return F.rms_norm(input, gain.shape, gain, epsilon)
    wide = input.float()
    inverse_root = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return gain * (wide * inverse_root).to(input.dtype)


def _turned(heads_XHD: Tensor, cos_X1D: Tensor, signed_sin_X1D: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + D/2}) rotated by the angle of its place; two roundings, as the library has it."""
    swapped_XHD = heads_XHD.roll(heads_XHD.shape[-1] // 2, dims=-1)
    if heads_XHD.dtype != cos_X1D.dtype:  # under autocast: the angles are kept wide, and so is what they turn
        heads_XHD, swapped_XHD = heads_XHD.to(cos_X1D.dtype), swapped_XHD.to(cos_X1D.dtype)
    return (heads_XHD * cos_X1D).add_(swapped_XHD.mul_(signed_sin_X1D))


def _matrix(linear: Any) -> Matrix:
    return in_product(linear.weight), None if linear.bias is None else in_product(linear.bias)


def in_product(tensor: Tensor) -> Tensor:
    """In the precision that a product takes it in: autocast's where that is on, which leaves float64 alone."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _norm(norm: Any) -> Norm:
    return norm.weight, norm.variance_epsilon


# -- whole documents --------------------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_at(model: Any, ids_BT: Tensor, place_BT: Tensor) -> Tensor:
    """Last hidden states [N, C], after the final norm, at the places where the mask is True, row by row.

    model   in eval mode, one that :func:`is_plain`
    ids_BT  one document a row, from its first place on; what stands behind it is read by nothing before

    All layers but the last read every place. The last mixes values from everywhere, and goes on where it is asked to.
    """
    decoder, (cos_TD, sin_TD) = Decoder.of(model), turn_of(model, ids_BT.shape[1])
    turn_T1D = cos_TD[:, None], sin_TD[:, None]
    hidden_XC = F.embedding(ids_BT, decoder.embedding_VC)
    for number, layer in enumerate(decoder.layers, start=1):
        mixed_XC = _mixed(layer, normed(hidden_XC, *layer.before), turn_T1D, decoder)
        if number == len(decoder.layers):
            hidden_XC, mixed_XC = hidden_XC[place_BT], mixed_XC[place_BT]
        hidden_XC = layer.finished(hidden_XC, mixed_XC)
    return normed(hidden_XC, *decoder.norm)


def _mixed(layer: Layer, normed_BTC: Tensor, turn_T1D: Turn, decoder: Decoder) -> Tensor:
    query_BHTD, key_BHTD, value_BHTD = (
        heads.transpose(1, 2) for heads in layer.heads(normed_BTC, turn_T1D, decoder.width)
    )
    mixed_BHTD = F.scaled_dot_product_attention(
        query_BHTD,
        key_BHTD,
        value_BHTD,
        is_causal=True,
        scale=decoder.scale,
        enable_gqa=query_BHTD.shape[1] != key_BHTD.shape[1],
    )
    return mixed_BHTD.transpose(1, 2).flatten(2)
