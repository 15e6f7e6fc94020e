"""TRL's two trainers that distil on policy, at the work of on_policy_setting.py: the reverse KL at temperature 1.

Each has its own loop, sampler, loss, logging and fused AdamW, as it comes. Off is what would be other work, or only
slower here: bfloat16, checkpoints, and computing activations twice. GKD's batches are tensors that are there already.
Imported where TRL is to run.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measuring import built
from on_policy_setting import LARGEST_NORM, LEARNING_RATE, LOGGED_EVERY, NEW_TOKENS, PROMPT_TOKENS, ROWS, Setting
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import set_verbosity_error

from research.losses.soft_target import soft_target
from research.records import DenseLogits


class Clock(TrainerCallback):
    """CPU seconds from the end of the first step to the end of the last."""

    seconds = started = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.started = time.process_time()
        self.seconds = time.process_time() - self.started


class Peers:
    """Both trainers at one setting, with the prompts of our fit."""

    def __init__(self, setting: Setting) -> None:
        set_verbosity_error()
        logging.getLogger("trl").setLevel(logging.ERROR)
        self._setting, self._tokenizer = setting, AutoTokenizer.from_pretrained(setting.folder / "student")
        data = built(setting.config("on_policy")).data
        self._texts = [data.codec.template.prompt(row.problem.text) for row in data.prompts()]
        self._ids = [list(row.ids) for row in data.prompts()]
        if self._tokenizer(text=self._texts)["input_ids"] != self._ids or {*map(len, self._ids)} != {PROMPT_TOKENS}:
            raise SystemExit(f"TRL reads other prompts than we do, or others than of {PROMPT_TOKENS} tokens")
        made: dict[str, Callable[[str], Any]] = {"GKDTrainer": self._gkd, "DistillationTrainer": self._distillation}
        self._made = made

    def seconds(self, name: str) -> float:
        """CPU seconds of one fit's timed steps."""
        drawn = 0

        def count(network: Any, args: Any, given: dict[str, Any]) -> None:
            nonlocal drawn
            if torch.is_grad_enabled():  # the pass that is trained
                drawn += int(given["attention_mask"].sum()) - ROWS * PROMPT_TOKENS

        clock = Clock()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = self._made[name](folder)
            trainer.add_callback(clock)
            trainer.remove_callback(PrinterCallback)
            trainer.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
            trainer.train()
        self._setting.check_tokens(name, drawn)
        return clock.seconds

    def loss_differs_by(self, name: str) -> float:
        """Of one batch, relative to our loss of it; stops where it is another loss."""
        generator = torch.Generator().manual_seed(0)
        drawn_BT = torch.randint(2, len(self._tokenizer), (ROWS, NEW_TOKENS), generator=generator)
        prompt_BT = torch.tensor(self._ids[:ROWS])
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = self._made[name](folder)
            theirs = float(trainer.compute_loss(trainer.model, _batch(name, prompt_BT, drawn_BT)))
        ours = self._our_loss(torch.cat([prompt_BT, drawn_BT], dim=1))
        if not abs(theirs - ours) < 1e-4 * ours:
            raise SystemExit(f"{name} has the loss {theirs} where ours is {ours}: it is another one")
        return abs(theirs - ours) / ours

    def _our_loss(self, ids_BT: Tensor) -> float:
        places = slice(PROMPT_TOKENS - 1, -1)
        with torch.no_grad():
            student_NV, teacher_NV = (
                self._model(name)(ids_BT).logits[:, places].flatten(0, 1) for name in ("student", "teacher")
            )
        return float(soft_target(student_NV, DenseLogits(teacher_NV), divergence="reverse_kl").mean())

    # -- the trainers -------------------------------------------------------------------------------------------------

    def _gkd(self, folder: str) -> Any:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        options = {"lmbda": 1.0, "beta": 1.0, "temperature": 1.0, "max_new_tokens": NEW_TOKENS}
        return GKDTrainer(
            self._model("student"),
            self._model("teacher"),
            args=GKDConfig(**self._common(folder), **options),
            train_dataset=Dataset.from_dict({"ids": self._ids}),
            data_collator=_prompts_alone,
            processing_class=self._tokenizer,
        )

    def _distillation(self, folder: str) -> Any:
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        options = {"beta": 1.0, "temperature": 1.0, "max_completion_length": NEW_TOKENS}
        return DistillationTrainer(
            self._model("student"),
            self._model("teacher"),
            args=DistillationConfig(**self._common(folder), **options),
            train_dataset=Dataset.from_dict({"prompt": self._texts}),
            processing_class=self._tokenizer,
        )

    def _model(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._setting.folder / name, dtype=torch.float32)

    def _common(self, folder: str) -> dict[str, Any]:
        return {
            "output_dir": folder,
            "per_device_train_batch_size": ROWS,
            "max_steps": self._setting.steps + 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "max_grad_norm": LARGEST_NORM,
            "logging_steps": LOGGED_EVERY,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
        }


def _prompts_alone(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of GKD's; what stands where a written answer would be is never trained on."""
    ids_BT = torch.tensor([row["ids"] for row in rows])
    seen_BT = torch.ones_like(ids_BT)
    prompts = {"prompts": ids_BT, "prompt_attention_mask": seen_BT}
    return {**prompts, "input_ids": ids_BT, "attention_mask": seen_BT, "labels": ids_BT}


def _batch(name: str, prompt_BT: Tensor, drawn_BT: Tensor) -> dict[str, Tensor]:
    """What each trainer's loss is given once the student has written."""
    if name == "GKDTrainer":
        ids_BT = torch.cat([prompt_BT, drawn_BT], dim=1)
        label_BT = torch.cat([torch.full_like(prompt_BT, -100), drawn_BT], dim=1)
        return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": label_BT}
    masks = {"prompt_mask": torch.ones_like(prompt_BT), "completion_mask": torch.ones_like(drawn_BT)}
    number = {"num_items_in_batch": torch.tensor(drawn_BT.numel())}
    return {"prompt_ids": prompt_BT, "completion_ids": drawn_BT, **masks, **number}
