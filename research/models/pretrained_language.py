"""Pretrained language models: a Hugging Face folder or hub id, trained whole or through low-rank adapters.

Only local code and safetensors are used: remote code is never run.
"""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from research.errors import CheckpointError, ConfigError
from research.models.language import AbstractLanguageModel, enable_gradient_checkpointing, set_generation_ids
from research.text.hub import holds_tokenizer, source_of, why_unread
from research.text.tokenizer import build_tokenizer
from research.text.tokenizer import tokenizer_sha256 as tokenizer_digest


class PretrainedLanguageModel(AbstractLanguageModel):
    """`AutoModelForCausalLM` of a folder or hub id, in `dtype`, with a head as wide as the tokenizer.

    path          folder with config.json and safetensors weights, or a hub id such as "Qwen/Qwen2.5-0.5B"
    revision      commit of a hub id: a name alone may change under a study
    dtype         of the weights; auto: as they are stored
    max_positions longest document; None: as the model's config says. A model of rotary positions has no weights for
                  them and may be given more than it was pretrained with
    lora_rank     train adapters of this rank beside the frozen weights (Hu et al. 2021); None: train every weight
    lora_alpha    the adapters' product is scaled by alpha / rank; None: 2 x rank
    lora_targets  names of the layers that get an adapter, such as ["q_proj", "v_proj"]; None: every linear layer but
                  the head

    A head that is padded wider than the tokenizer (Qwen: 151,936 rows for 151,665 ids) is cut to it, embedding and
    all, so that ids which stand for nothing hold no probability and are never drawn.

    Raises CheckpointError where nothing can be loaded, where weights are missing, which would be random, where the
    tokenizer beside them is another than the data's, or where the model knows fewer tokens than that has; ConfigError
    where adapters are asked for and `peft` is not installed.
    """

    def __init__(
        self,
        path: str,
        *,
        vocab_size: int,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        tokenizer_sha256: str | None = None,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        attention: Literal["sdpa", "eager"] = "sdpa",
        max_positions: int | None = None,
        gradient_checkpointing: bool = False,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        lora_targets: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if tokenizer_sha256 is not None:
            _refuse_other_tokens(path, tokenizer_sha256)
        model = load_causal_model(path, revision=revision, dtype=dtype, attention=attention)
        config = model.config.get_text_config()
        if config.vocab_size < vocab_size:
            raise CheckpointError(
                f"{path} knows {config.vocab_size} tokens, the tokenizer has {vocab_size}; "
                "take the tokenizer that belongs to the model"
            )
        if config.vocab_size > vocab_size:
            model.resize_token_embeddings(vocab_size)
        if max_positions is not None:
            _set_positions(config, max_positions)
        set_generation_ids(model, eos_token_id, pad_token_id)
        self.vocab_size, self.max_positions = vocab_size, getattr(config, "max_position_embeddings", None)
        if gradient_checkpointing:
            enable_gradient_checkpointing(model)
            if lora_rank is not None:
                model.enable_input_require_grads()  # recomputation needs a gradient to reach the adapters
        self.adapted = lora_rank is not None
        self.model = model.train()
        if lora_rank is not None:
            self.model = _with_adapters(model, lora_rank, lora_alpha, lora_dropout, lora_targets)

    def exported(self) -> Any:
        return copy.deepcopy(self.model).merge_and_unload() if self.adapted else self.model


def load_causal_model(
    path: str | Path, *, revision: str | None = None, dtype: str = "float32", attention: str = "sdpa"
) -> Any:
    """The model of transformers in a folder or under a hub id, every weight of it read.

    Raises CheckpointError where there is none, or where it lacks weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not path:
        raise ConfigError("model.path is not set; give the folder or hub id of a causal language model")
    inner = Path(path) / "student"
    if not (Path(path) / "config.json").exists() and (inner / "config.json").exists():
        raise CheckpointError(f"{path} is a run's folder, and its network is in {inner}: give that")
    try:
        with torch.random.fork_rng(devices=[]):  # it draws initial weights before it reads the trained ones
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source_of(path, revision),
                revision=revision or "main",
                local_files_only=Path(path).exists(),
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attention,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        told = "" if Path(path).exists() else f" ({why_unread(path)})"
        raise CheckpointError(
            f"{path} is not a causal language model that transformers can load{told}: {error}"
        ) from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of its tensors ({', '.join(missing[:3])}), which would be random; "
            "give the folder of a trained causal language model"
        )
    return model


def _refuse_other_tokens(path: str, given: str) -> None:
    """Compare the tokenizer beside a model's weights, where there is one, with the data's."""
    if Path(path).is_dir() and not holds_tokenizer(Path(path)):
        return
    try:
        own = tokenizer_digest(build_tokenizer(path))
    except ConfigError:  # a repository without one, or nothing at all: loading the model tells
        return
    if own != given:
        raise CheckpointError(
            f"{path} comes with a tokenizer of its own ({own[:12]}..), and the data's is another ({given[:12]}..): its "
            f"ids stand for other text. Give data.tokenizer='{path}'"
        )


def _set_positions(config: Any, max_positions: int) -> None:
    if max_positions < 1:
        raise ConfigError(f"model.max_positions is {max_positions}; expected at least 1, or null for the model's own")
    if not hasattr(config, "rope_parameters"):
        raise ConfigError(
            f"model.max_positions is {max_positions}, but a {config.model_type} has weights for each of its "
            f"{config.max_position_embeddings} positions; leave it out"
        )
    config.max_position_embeddings = max_positions


def _with_adapters(model: Any, rank: int, alpha: float | None, dropout: float, targets: Sequence[str] | None) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        raise ConfigError(
            f"model.lora_rank is {rank}, which needs peft; pip install 'research-distillation[lora]', "
            "or leave lora_rank out to train every weight"
        ) from None
    if rank < 1:
        raise ConfigError(f"model.lora_rank is {rank}; expected at least 1, or null to train every weight")
    options = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules="all-linear" if targets is None else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's are transposed
    )
    try:
        with warnings.catch_warnings():  # peft asks transformers by names that are to be renamed
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, options)
    except ValueError as error:
        raise ConfigError(f"model.lora_targets is {targets}: {error}") from None
