"""Experiments too large to run here: the networks that they name, on the meta device, fit what is asked of them."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

from research.errors import CheckpointError, ConfigError
from research.models.pretrained_language import PretrainedLanguageModel
from research.schemas import register_schemas

CONF = Path(__file__).parents[2] / "conf"
QWEN: dict[str, Any] = {"vocab_size": 151936, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def sizes(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, positions: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": positions, **more,
    }  # fmt: skip


# hub id -> (architecture, its published sizes, its published number of parameters)
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "openai-community/gpt2": ("gpt2", {}, 124_439_808),
    "Qwen/Qwen2.5-0.5B": (
        "qwen2", QWEN | sizes(896, 4864, 24, 14, 2, 32768, tie_word_embeddings=True), 494_032_768),
    "Qwen/Qwen2.5-1.5B": (
        "qwen2", QWEN | sizes(1536, 8960, 28, 12, 2, 131072, tie_word_embeddings=True), 1_543_714_304),
    "Qwen/Qwen2.5-7B-Instruct": (
        "qwen2", QWEN | sizes(3584, 18944, 28, 28, 4, 32768, vocab_size=152064), 7_615_616_512),
    "Qwen/Qwen3-8B-Base": ("qwen3", QWEN | sizes(4096, 12288, 36, 32, 8, 32768, head_dim=128), 8_190_735_360),
    "Qwen/Qwen3-32B": ("qwen3", QWEN | sizes(5120, 25600, 64, 64, 8, 40960, head_dim=128), 32_762_123_264),
    "Qwen/Qwen2.5-Math-1.5B": (
        "qwen2", QWEN | sizes(1536, 8960, 28, 12, 2, 4096, tie_word_embeddings=True), 1_543_714_304),
    "Qwen/Qwen2.5-Math-7B": (
        "qwen2", QWEN | sizes(3584, 18944, 28, 28, 4, 4096, vocab_size=152064), 7_615_616_512),
    "Qwen/Qwen2.5-14B": (
        "qwen2", QWEN | sizes(5120, 13824, 48, 40, 8, 131072, vocab_size=152064), 14_770_033_664),
    "Qwen/Qwen2.5-32B": (
        "qwen2", QWEN | sizes(5120, 27648, 64, 40, 8, 131072, vocab_size=152064), 32_763_876_352),
    "meta-llama/Llama-3.1-8B": ("llama", LLAMA | sizes(4096, 14336, 32, 32, 8, 131072), 8_030_261_248),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", LLAMA | sizes(8192, 28672, 80, 64, 8, 131072), 70_553_706_496),
}  # fmt: skip
# claims C25: student -> base, peak rate; the rate falls to a tenth
SIX = {
    "r1_distill_qwen_1.5b": ("Qwen/Qwen2.5-Math-1.5B", 1e-4),
    "r1_distill_qwen_7b": ("Qwen/Qwen2.5-Math-7B", 8e-5),
    "r1_distill_llama_8b": ("meta-llama/Llama-3.1-8B", 5e-5),
    "r1_distill_qwen_14b": ("Qwen/Qwen2.5-14B", 7e-5),
    "r1_distill_qwen_32b": ("Qwen/Qwen2.5-32B", 6e-5),
    "r1_distill_llama_70b": ("meta-llama/Llama-3.3-70B-Instruct", 2e-5),
}
# student -> teacher, whose ids are the same
TAUGHT = {
    "qwen2.5_0.5b_gsm8k_on_policy": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5_1.5b_gsm8k_on_policy": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3_8b_on_policy": "Qwen/Qwen3-32B",
}
FULL_SCALE = ("gpt2_gsm8k_chain", "qwen2.5_0.5b_gsm8k_sft", "qwen2.5_0.5b_gsm8k_grpo", *TAUGHT, *SIX)


@lru_cache
def composed(name: str) -> Any:
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[f"experiment={name}"])


def test_every_experiment_of_a_pretrained_network_is_checked_here() -> None:
    files = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    assert {name for name in files if student_of(name) == "pretrained_lm"} == set(FULL_SCALE)


def student_of(name: str) -> str | None:
    """The choice of the group model@student in an experiment's file, or in one that it takes over."""
    found = None
    for item in yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text()).get("defaults", []):
        if isinstance(item, str):
            found = student_of(item) if item != "_self_" else found
        else:
            found = item.get("override /model@student", found)
    return found


@pytest.mark.parametrize("name", FULL_SCALE)
def test_the_published_network_has_room_for_the_documents(name: str) -> None:
    cfg = composed(name)
    config = published_config(cfg.student.path)
    positions = cfg.student.max_positions or config.max_position_embeddings
    assert cfg.data.max_tokens <= positions
    assert cfg.data.num_prompts or cfg.data.packed_to >= cfg.data.max_tokens
    assert cfg.data.tokenizer == cfg.student.path


def published_config(hub_id: str) -> Any:
    """The config of a published network, whose model on the meta device has the published parameters and runs."""
    architecture, published, parameters = PUBLISHED[hub_id]
    config = transformers.AutoConfig.for_model(architecture, **published)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    assert model(input_ids=ids).logits.shape == (1, 8, config.vocab_size)
    return config


@pytest.mark.parametrize("name", TAUGHT)
def test_the_teacher_has_room_for_what_its_student_writes(name: str) -> None:
    cfg = composed(name)
    assert cfg.teacher.path == TAUGHT[name] and cfg.teacher.signal == "hidden" and cfg.teacher.dtype == "bfloat16"
    assert cfg.data.max_tokens <= published_config(cfg.teacher.path).max_position_embeddings
    assert cfg.method.max_new_tokens < cfg.data.max_tokens


@pytest.mark.parametrize("name", SIX)
def test_the_six_students_have_their_published_bases_and_rates(name: str) -> None:
    cfg, (base, rate) = composed(name), SIX[name]
    assert (cfg.student.path, cfg.optimizer.lr) == (base, rate)
    assert cfg.scheduler._target_.endswith("CosineAnnealingLR") and cfg.scheduler.eta_min == pytest.approx(rate / 10)
    assert (cfg.data.max_tokens, cfg.data.batch_size, cfg.data.packed_to) == (32768, 64, 32768)
    assert cfg.trainer.precision == "bf16-mixed" and cfg.student.gradient_checkpointing and cfg.trainer.max_epochs == 2


def test_a_run_without_its_store_is_refused_before_anything_is_fetched(
    distill: Callable[..., Any], tmp_path: Path
) -> None:
    done = distill("train", "experiment=r1_distill_qwen_1.5b", "trainer=smoke", cwd=tmp_path)
    assert done.error.startswith("data.store is an interpolation that leads nowhere: ") and "TRACES_STORE" in done.error


# -- more positions than a base was pretrained with -------------------------------------------------------------------


def saved(folder: Path, architecture: str = "qwen2") -> Any:
    """A network of 16 positions."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.5,
        **({} if architecture == "gpt2" else {"intermediate_size": 24, "num_key_value_heads": 1}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


FACTS: dict[str, Any] = {"vocab_size": 23, "eos_token_id": 1, "pad_token_id": 0}


def test_rotary_positions_can_be_raised_and_are_the_same_below(tmp_path: Path) -> None:
    model, ids = saved(tmp_path), torch.arange(20)[None]
    inputs = (ids, torch.arange(20)[None], torch.ones_like(ids))
    with pytest.raises(ValueError, match="a document has 20 tokens, the model is built for max_positions=16"):
        PretrainedLanguageModel(str(tmp_path), **FACTS)(*inputs)
    network = PretrainedLanguageModel(str(tmp_path), max_positions=20, **FACTS).eval()
    assert torch.equal(network(*inputs), model(ids).logits)
    assert network.exported().config.max_position_embeddings == 20


def test_learned_positions_cannot_be_raised(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    with pytest.raises(ConfigError, match="max_positions is 20, but a gpt2 has weights for each of its 16 positions"):
        PretrainedLanguageModel(str(tmp_path), max_positions=20, **FACTS)
    with pytest.raises(ConfigError, match="max_positions is 0; expected at least 1"):
        PretrainedLanguageModel(str(tmp_path), max_positions=0, **FACTS)
    with pytest.raises(CheckpointError):
        PretrainedLanguageModel(str(tmp_path / "nothing"), max_positions=20, **FACTS)
