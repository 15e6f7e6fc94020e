"""The logits of a causal language model, not yet multiplied: last hidden states and output head."""

from typing import Any

import torch
from torch import nn

from research.errors import ConfigError
from research.losses.projection import project
from research.models.modes import eval_mode
from research.records import HiddenProjection


def projection_of(model: Any, arguments: dict[str, Any]) -> HiddenProjection:
    """Last hidden states after the final norm, and the head, of a model of transformers called with ``arguments``.

    The head's weight is the model's own parameter, tied to the embedding or not. Adapters (peft) within the layers are
    part of the hidden states. Raises ConfigError for a head that is more than one matrix, such as one with an adapter.
    """
    unwrap = getattr(model, "get_base_model", None)  # of a model with adapters
    causal = model if unwrap is None else unwrap()
    head = causal.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"the output head is a {type(head).__name__}, not one matrix, so hidden states do not make the logits; "
            "take it out of model.lora_targets, or use dense logits (teacher.signal=dense and method.chunk_rows=null)"
        )
    return HiddenProjection(
        hidden_ND=causal.base_model(**arguments).last_hidden_state,
        weight_VD=head.weight,
        bias_V=head.bias,
        softcap=getattr(causal.config.get_text_config(), "final_logit_softcapping", None) or None,
    )


@torch.no_grad()
def check_projection(model: Any, arguments: dict[str, Any]) -> None:
    """Raise ConfigError unless the projection of these arguments is the model's own logits, within rounding.

    Some architectures scale their logits (Cohere, Granite); what they do besides a cap is not in a projection.
    """
    with eval_mode(model):
        expected_BTV = model(**arguments).logits.float()
        difference_BTV = project(projection_of(model, arguments)).float() - expected_BTV
    rounding = 100 * torch.finfo(model.dtype).eps * float(expected_BTV.abs().max().clamp(min=1.0))
    if not float(difference_BTV.abs().max()) <= rounding:
        raise ConfigError(
            f"the logits of a {model.config.model_type} are not its last hidden states times its head (they differ by "
            f"{float(difference_BTV.abs().max()):.3g}); use dense logits (teacher.signal=dense and "
            "method.chunk_rows=null)"
        )
