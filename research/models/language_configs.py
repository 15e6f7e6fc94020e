"""The sizes of a language model from scratch, as `transformers` writes them down."""

from typing import Any


def rotary_config(
    architecture: str,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None,
    intermediate_size: int,
    theta: float,
    positions: int,
    dropout: float,
    common: dict[str, Any],
) -> Any:
    """Llama, or Qwen3 by name: rotary positions of base ``theta``; the other sizes as `LanguageModel` has them."""
    from transformers import LlamaConfig, Qwen3Config

    config_class = LlamaConfig if architecture == "llama" else Qwen3Config
    return config_class(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads or num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attention_dropout=dropout,
        **common,
    )


def gpt2_config(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    inner: int | None,
    positions: int,
    dropout: float,
    common: dict[str, Any],
) -> Any:
    """GPT-2: learned positions, a plain MLP of width ``inner`` (None: 4 x hidden_size)."""
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=hidden_size,
        n_layer=num_layers,
        n_head=num_heads,
        n_inner=inner or 4 * hidden_size,
        n_positions=positions,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        **common,
    )
