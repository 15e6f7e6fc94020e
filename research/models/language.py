"""Causal language models of `transformers` behind one call: `network(ids_BT, position_BT, segment_BT) -> logits_BTV`.

The library's own model is at `.model`, for generation and for export; nothing of it is rewritten. What is added here is
that documents packed into one row never see each other.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from research.errors import ConfigError
from research.models.hidden import check_projection, projection_of
from research.models.language_configs import gpt2_config, rotary_config
from research.models.rotary import hidden_at, is_plain
from research.records import HiddenProjection

ARCHITECTURES = ("llama", "qwen3", "gpt2")
DEFAULT_ROPE_THETA = 10_000.0
SHARD_SIZE = "5GB"  # of weights on disk
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"  # the library's names of types of layer


class AbstractLanguageModel(nn.Module):
    """A causal language model.

    model       the `PreTrainedModel` of transformers
    vocab_size  V, the number of logits: the tokens of the tokenizer
    """

    model: Any
    vocab_size: int
    max_positions: int | None
    _projects: bool = False  # whether hidden states and head were seen to make the model's own logits

    @abstractmethod
    def exported(self) -> Any:
        """The plain transformers model to write to disk: adapters merged, nothing else changed."""

    def forward(self, ids_BT: Tensor, position_BT: Tensor, segment_BT: Tensor) -> Tensor:
        """Logits [B, T, V]: those at t are of the token after t, given its document up to and with t.

        ids_BT       int64 token ids
        position_BT  int64 place within its document, from 0
        segment_BT   int64 number of the document within its row, from 1; 0 on padding, whose logits mean nothing

        Raises ValueError for a document that is longer than the model's positions.
        """
        return self.model(**self._arguments(ids_BT, position_BT, segment_BT)).logits

    def hidden_projection(self, ids_BT: Tensor, position_BT: Tensor, segment_BT: Tensor) -> HiddenProjection:
        """What makes the logits of :meth:`forward`, not yet multiplied: last hidden states [B, T, D] and the head.

        The hidden states are those after the final norm; the head's weight is the model's own parameter, tied or not,
        so that a loss of the projection trains both. The first call makes a few logits both ways and compares them.

        Raises ConfigError for a head that is more than one matrix (an adapter on it), or a model that does more to its
        logits than a cap; ValueError as :meth:`forward` does.
        """
        if not self._projects and not ids_BT.is_meta:
            short_BT = ids_BT[:1, :4]
            place_BT = torch.arange(short_BT.shape[1], device=ids_BT.device)[None]
            check_projection(self.model, self._arguments(short_BT, place_BT, torch.ones_like(short_BT)))
            self._projects = True
        return projection_of(self.model, self._arguments(ids_BT, position_BT, segment_BT))

    def reads_places(self, ids_BT: Tensor, position_BT: Tensor, segment_BT: Tensor) -> bool:
        """Whether :meth:`hidden_projection_at` reads hidden states to the bits of the library's own pass.

        On a CPU without autocast, in eval mode, one document a row, for a model that ``rotary.is_plain`` with fused
        attention.
        """
        is_untouched = not (self.training or self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self))
        return (
            is_untouched
            and ids_BT.device.type == "cpu"
            and self.model.config._attn_implementation == "sdpa"
            and not torch.is_autocast_enabled("cpu")
            and is_plain(self.model)
            and one_document_a_row(position_BT, segment_BT)
        )

    def hidden_projection_at(self, ids_BT: Tensor, position_BT: Tensor, place_BT: Tensor) -> HiddenProjection:
        """Without gradient, last hidden states [N, D] at the places where the mask is True, and the head.

        For rows that :meth:`reads_places`. Raises ValueError as :meth:`forward` does.
        """
        self._check_length(position_BT)
        head = self.model.lm_head
        return HiddenProjection(hidden_at(self.model, ids_BT, place_BT), head.weight, head.bias)

    def _arguments(self, ids_BT: Tensor, position_BT: Tensor, segment_BT: Tensor) -> dict[str, Any]:
        """What the library's model is called with."""
        self._check_length(position_BT)
        mask: Tensor | dict[str, Tensor] | None = None
        if not one_document_a_row(position_BT, segment_BT):
            mask = self._attention_mask(segment_BT)
        else:  # padding stands behind the document, where causality alone hides it: no mask, the fast kernels
            position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        return {"input_ids": ids_BT, "attention_mask": mask, "position_ids": position_BT, "use_cache": False}

    def _attention_mask(self, segment_BT: Tensor) -> Tensor | dict[str, Tensor]:
        """Who sees whom, as the library takes it: one mask, or one for each type of layer where they differ.

        It is taken as it is, so that a layer's sliding window has to be in it.
        """
        if segment_BT.is_meta:  # FLOPs are the same, whatever a mask hides
            return self._for_attention(same_document_and_before(segment_BT))
        windows = packed_windows(self.model, segment_BT.shape[1])
        masks = {
            window: self._for_attention(same_document_and_before(segment_BT, window))
            for window in set(windows.values())
        }
        if len(masks) == 1:
            return masks.popitem()[1]
        return {layer_type: masks[window] for layer_type, window in windows.items()}

    def _for_attention(self, seen_B1TT: Tensor) -> Tensor:
        """The mask of fused kernels, which keep what is True, or of eager attention, which adds it to the scores."""
        if self.model.config._attn_implementation == "sdpa":
            return seen_B1TT
        dtype = self.model.dtype
        hidden = torch.finfo(dtype).min
        return torch.zeros(seen_B1TT.shape, dtype=dtype, device=seen_B1TT.device).masked_fill(~seen_B1TT, hidden)

    def _check_length(self, position_BT: Tensor) -> None:
        limit = self.max_positions
        if limit is None or position_BT.shape[1] <= limit or position_BT.is_meta:
            return
        longest = int(position_BT.max()) + 1
        if longest > limit:
            raise ValueError(
                f"a document has {longest} tokens, the model is built for max_positions={limit}; "
                "drop longer documents with data.max_tokens, or build the model with more positions"
            )

    def stored_names(self) -> dict[str, str]:
        """Name in this module's state dict -> name in `model.safetensors`, as transformers has it.

        Tied parameters share one name, as they share one tensor.
        """
        tied = self.model.all_tied_weights_keys
        return {f"model.{name}": tied.get(name, name) for name in self.model.state_dict()}


class LanguageModel(AbstractLanguageModel):
    """A language model from scratch: Llama, Qwen3 or GPT-2 of any size.

    architecture       llama: RMSNorm, rotary positions, gated MLP; qwen3: the same with normalised queries and keys;
                       gpt2: LayerNorm, learned positions, plain MLP
    num_kv_heads       key and value heads, shared by groups of query heads; None: as many as query heads
    intermediate_size  width of the MLP; None: 4 x hidden_size for gpt2, and for the gated ones 8/3 x hidden_size
                       rounded up to a multiple of 8, which has as many parameters
    max_positions      longest document
    dropout            of attention weights; for gpt2 of embeddings and residuals too
    rope_theta         base of the rotary frequencies; None: 10,000
    initializer_range  standard deviation of the initial weights; a small one starts the loss at ln(vocab_size)
    attention          sdpa (fused kernels) or eager

    The model ends documents with `eos_token_id`. Padding has an embedding like any token: where it is also the EOS,
    the EOS stays trained. Raises ConfigError, naming the key, for sizes that do not fit each other.
    """

    def __init__(
        self,
        architecture: Literal["llama", "qwen3", "gpt2"],
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        *,
        vocab_size: int,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        num_kv_heads: int | None = None,
        intermediate_size: int | None = None,
        max_positions: int = 512,
        tie_embeddings: bool = False,
        dropout: float = 0.0,
        rope_theta: float | None = None,
        initializer_range: float = 0.02,
        attention: Literal["sdpa", "eager"] = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
        checked = {**sizes, "max_positions": max_positions, "vocab_size": vocab_size}
        if intermediate_size is not None:
            checked["intermediate_size"] = intermediate_size
        _check_sizes(checked, num_kv_heads, architecture)
        if not 0 <= dropout < 1:
            raise ConfigError(f"model.dropout is {dropout}; expected a probability in [0, 1)")
        if not 0 < initializer_range <= 1:
            raise ConfigError(f"model.initializer_range is {initializer_range}; expected a deviation in (0, 1]")
        common = {
            "vocab_size": vocab_size,
            "initializer_range": initializer_range,
            "tie_word_embeddings": tie_embeddings,
            "bos_token_id": None,
            "eos_token_id": eos_token_id if isinstance(eos_token_id, int) else list(eos_token_id),
            "attn_implementation": attention,
        }
        if architecture == "gpt2":
            _refuse_for_gpt2(num_kv_heads=num_kv_heads, rope_theta=rope_theta)
            config = gpt2_config(
                **sizes, inner=intermediate_size, positions=max_positions, dropout=dropout, common=common
            )
        else:
            config = rotary_config(
                architecture,
                **sizes,
                num_kv_heads=num_kv_heads,
                intermediate_size=intermediate_size or gated_width(hidden_size),
                theta=DEFAULT_ROPE_THETA if rope_theta is None else rope_theta,
                positions=max_positions,
                dropout=dropout,
                common=common,
            )
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.model = _from_config(config, pad_token_id)
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.model)

    def exported(self) -> Any:
        return self.model


def one_document_a_row(position_BT: Tensor, segment_BT: Tensor) -> bool:
    """Whether every row is one document from its first place, with nothing but padding behind it.

    False on the meta device, where values cannot be read: FLOPs are counted with the mask.
    """
    if segment_BT.is_meta:
        return False
    inside_BT = segment_BT != 0
    place_T = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    right_padded = (segment_BT <= 1).all() & (segment_BT.diff(dim=1) <= 0).all()
    return bool(right_padded & ((position_BT == place_T) | ~inside_BT).all())


def same_document_and_before(segment_BT: Tensor, window: int | None = None) -> Tensor:
    """bool [B, 1, T, T], True where the query's place (third) may attend to the key's (last).

    window  last places that a query attends to, its own among them, as transformers counts them; None: all before

    A document's places stand beside each other, so that a window of the row is a window of the document. Padding
    attends to the padding before it, so that no row of the softmax is empty.
    """
    length = segment_BT.shape[1]
    before_TT = torch.ones(length, length, dtype=torch.bool, device=segment_BT.device).tril()
    if window is not None:
        before_TT = before_TT.triu(1 - window)
    return ((segment_BT[:, :, None] == segment_BT[:, None, :]) & before_TT)[:, None]


def packed_windows(model: Any, length: int) -> dict[str, int | None]:
    """The window of each type of layer of a model, for rows of ``length`` tokens; None: as long as the row, or none.

    Raises ConfigError for layers that a mask does not keep to one document as they are alone: recurrent ones,
    convolutions, attention in chunks.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    every_layer = FULL_ATTENTION if window is None else SLIDING_ATTENTION
    layer_types = sorted(set(getattr(config, "layer_types", None) or [every_layer]))
    others = [layer_type for layer_type in layer_types if layer_type not in (FULL_ATTENTION, SLIDING_ATTENTION)]
    if others or getattr(model, "_is_stateful", False):
        raise ConfigError(
            f"a row holds several documents, or does not begin with one, and a {config.model_type} has layers of "
            f"{', '.join(others) or 'a recurrent state'}, which no mask keeps to one document; expected layers of "
            f"{FULL_ATTENTION} and {SLIDING_ATTENTION} alone: leave data.packed_to null for this model"
        )
    if window is not None and window >= length:
        window = None
    return {layer_type: window if layer_type == SLIDING_ATTENTION else None for layer_type in layer_types}


def gated_width(hidden_size: int) -> int:
    """Width of a gated MLP (three matrices) with the parameters of a plain one of 4 x hidden_size (two)."""
    return -(-8 * hidden_size // 3 // 8) * 8


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def set_generation_ids(model: Any, eos_token_id: int | Sequence[int], pad_token_id: int) -> None:
    """What `generate` and a server stop at and fill with; kept in generation_config.json alone.

    `config.pad_token_id` stays unset: transformers would freeze that row of the embedding at zero, EOS or not.
    """
    from transformers import GenerationConfig

    ids = eos_token_id if isinstance(eos_token_id, int) else list(eos_token_id)
    model.generation_config = GenerationConfig(eos_token_id=ids, pad_token_id=pad_token_id)


def write_folder(model: Any, folder: Path) -> None:
    """`save_pretrained` without a progress bar: the weights in one file up to SHARD_SIZE, above it in several."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()  # one file would be read before the several that are written after it
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def _from_config(config: Any, pad_token_id: int) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    set_generation_ids(model, config.eos_token_id, pad_token_id)
    return model.train()


def _check_sizes(sizes: dict[str, int], num_kv_heads: int | None, architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"model.architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"model.{name} is {size}; expected at least 1")
    width, heads = sizes["hidden_size"], sizes["num_heads"]
    if width % heads or (architecture != "gpt2" and width // heads % 2):
        even = "" if architecture == "gpt2" else " of even width, since rotary positions turn pairs"
        raise ConfigError(f"model.hidden_size is {width} and model.num_heads is {heads}; expected whole heads{even}")
    if num_kv_heads is not None and (num_kv_heads < 1 or heads % num_kv_heads):
        raise ConfigError(f"model.num_kv_heads is {num_kv_heads}; expected a divisor of model.num_heads={heads}")


def _refuse_for_gpt2(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"model.{name} is {value}, which gpt2 does not have; leave it out")
