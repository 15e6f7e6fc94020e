"""The work of on_policy_benchmark.py: two tiny language models, the same prompts, and a fit of ours with a clock.

Every step has 16 completions of 32 tokens behind prompts of 16. The weights are drawn and never trained; neither model
gives the end of a text any probability, so that no completion of any arm is shorter.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from benchmark import composed
from measuring import built

ROWS, PROMPT_TOKENS, NEW_TOKENS = 16, 16, 32
SAMPLES = 8  # of one problem, where rewards are compared
LEARNING_RATE, LARGEST_NORM, LOGGED_EVERY = 1e-3, 1.0, 10
SIZES = {
    "student": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "intermediate_size": 360},  # 0.82 M
    "teacher": {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "intermediate_size": 1088},  # 4.4 M
}
ONE_LAYER = {name: sizes | {"num_layers": 1} for name, sizes in SIZES.items()}
# sums of eight digits: 15 characters and "="
RUN = ["task=sum8", "task.highest=9", "template=plain", "data=prompts", "data.num_val=0", "data.num_test=0",
       "model@student=llama", "optimizer=adamw", f"optimizer.lr={LEARNING_RATE}", "scheduler=constant",
       "trainer.max_epochs=1", f"trainer.gradient_clip_val={LARGEST_NORM}", "trainer.enable_progress_bar=false",
       f"trainer.log_every_n_steps={LOGGED_EVERY}"]  # fmt: skip
METHODS = {
    "on_policy": (ROWS, ["method=on_policy", "teacher=frozen"]),
    "policy_gradient": (ROWS // SAMPLES, ["method=policy_gradient", f"method.num_samples={SAMPLES}"]),
    "rounded_teacher": (ROWS, ["method=on_policy", "teacher=frozen", "teacher.dtype=bfloat16"]),
}


@dataclass(frozen=True)
class Setting:
    """What every arm starts from.

    folder   holds `student` and `teacher`, each a folder of transformers with the tokenizer in it
    sizes    of both models
    steps    optimizer steps of a fit that are timed; one goes before them
    """

    folder: Path
    sizes: dict[str, dict[str, int]]
    steps: int

    def config(self, method: str) -> Any:
        """Of `distill train`, for one fit."""
        problems, chosen = METHODS[method]
        student = [f"student.{name}={size}" for name, size in self.sizes["student"].items()]
        length = [f"data.num_prompts={problems}", f"data.num_train={problems * (self.steps + 1)}"]
        teacher = [f"teacher.path={self.folder / 'teacher'}"] if "teacher=frozen" in chosen else []
        drawn = [f"method.max_new_tokens={NEW_TOKENS}", f"init_from={self.folder / 'student'}"]
        return composed([*RUN, *chosen, *student, *length, *teacher, *drawn])

    def check_tokens(self, arm: str, drawn: float) -> None:
        """Stop where an arm drew other than all tokens: its work was not that of the others."""
        expected = ROWS * NEW_TOKENS * (self.steps + 1)
        if drawn != expected:
            raise SystemExit(f"{arm} drew {drawn:g} tokens in {self.steps + 1} steps; expected {expected}")


def write_models(setting: Setting) -> dict[str, int]:
    """Both models as folders; their parameters, and the tokens of the vocabulary."""
    from research.config import build_data, plain
    from research.models.build import build_network, describe
    from research.models.weights import count_parameters, save_network, save_tokenizer

    cfg = composed([*RUN, "data.num_train=1"])
    data = build_data(cfg)
    facts, told = data.facts(), {"vocabulary": data.codec.vocab_size}
    for seed, (name, sizes) in enumerate(setting.sizes.items()):
        description = {**plain(cfg.student), **sizes, "initializer_range": 0.1}
        torch.manual_seed(seed)
        network: Any = build_network(description, **facts)
        with torch.no_grad():  # a direction that all tokens share, and that the end's row of the head is against
            network.model.get_input_embeddings().weight.add_(4.0)
            network.model.get_output_embeddings().weight[facts["eos_token_id"]] = -1.0
        save_network(setting.folder / name, network, describe(description, **facts))
        save_tokenizer(setting.folder / name, data.codec.tokenizer)
        told[f"{name}_parameters"] = count_parameters(network)
    return told


class Clock(L.Callback):
    """CPU seconds from the end of the first step to the end of the last."""

    seconds = started = 0.0

    def __init__(self, method: Any) -> None:
        self.method = method

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 1:
            self.started = time.process_time()
        self.seconds = time.process_time() - self.started


AnyClock = TypeVar("AnyClock", bound=Clock)


def fitted(setting: Setting, method: str, clock_of: Callable[[Any], AnyClock]) -> AnyClock:
    """One fit as `distill train` sets it up, with its logger; no checkpoints and no validation."""
    from research.config import build_logger, build_trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # importing lightning sets it to INFO
    cfg = setting.config(method)
    parts = built(cfg)
    clock = clock_of(parts.method)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        late = {"default_root_dir": folder, "callbacks": [clock], "logger": build_logger(cfg, Path(folder))}
        quiet = {"enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        trainer = build_trainer(cfg.trainer, **late, **quiet)
        torch.manual_seed(0)
        trainer.fit(parts.method, datamodule=parts.data)
    setting.check_tokens(method, parts.method.rollout_cost.tokens)
    return clock
