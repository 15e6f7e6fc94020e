"""A run whose student writes, interrupted anywhere and gone on with, is the run that was not, to the last bit.

With everything that has a state: dropout, Adam, a schedule, accumulation, stored traces by a coin, and rollouts that
serve for two steps, the second of them after the weights that they were drawn from are gone.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from research.loops.fit import KeepLast
from research.methods.on_policy import OnPolicy
from research.methods.policy_gradient import PolicyGradient
from research.methods.schedules import warmup_then_linear

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS, STEPS, MICRO_BATCHES = 2, 12, 2  # ten prompts an epoch: blocks of 4, 4 and 2, two steps each
STATE: dict[str, Any] = {"num_samples": 2, "max_new_tokens": 8, "max_sampler_kl": 1e6}
METHODS: dict[str, Callable[..., Any]] = {
    "mixed": partial(OnPolicy, on_policy_fraction=0.5, hard_weight=0.5, **STATE),
    "sampled_token": partial(OnPolicy, objective="sampled_token", reward_weight=0.5, clip_high=0.5, **STATE),
    "policy_gradient": partial(PolicyGradient, kl_weight=0.1, filter_groups=True, **STATE),
}


class Boom(Exception):
    """An error in the middle of a step."""


class Explode(L.Callback):
    """An error at one micro-batch of the run, counted from 1: before its forward pass, or after it."""

    def __init__(self, call: int, before_forward: bool) -> None:
        self.call, self.before_forward, self.calls = call, before_forward, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.calls += 1
        if self.before_forward and self.calls == self.call:
            raise Boom

    def on_before_backward(self, *_: Any) -> None:
        if not self.before_forward and self.calls == self.call:
            raise Boom


class KeepNoException(KeepLast):
    """What a kill leaves: the checkpoint of the last whole step."""

    def on_exception(self, *_: Any) -> None:
        pass


def make(words: Any, name: str) -> Any:
    data = words.make_data()
    student = words.make_network(data, dropout=0.3)
    training = words.make_training(
        data,
        student,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        scheduler=partial(warmup_then_linear, warmup_fraction=0.2),
    )
    teacher = () if name == "policy_gradient" else (words.make_teacher(data),)
    return METHODS[name](training, *teacher)


def run(words: Any, name: str, callbacks: list[Any], seed: int, ckpt_path: Path | None = None) -> tuple[Any, Any]:
    stored = 0 if name == "policy_gradient" else 3
    data = words.make_data(num_train=10, num_prompts=4, steps_per_rollout=2, num_stored=stored, seed=4)
    method, watch = make(words, name), words.Watch()
    trainer = words.make_trainer(
        max_steps=-1, max_epochs=EPOCHS, accumulate_grad_batches=MICRO_BATCHES, enable_checkpointing=True,
        callbacks=[*callbacks, watch],
    )  # fmt: skip
    torch.manual_seed(seed)
    trainer.fit(method, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    assert trainer.global_step == STEPS
    return method, watch


def told(words: Any, method: Any) -> dict[str, Any]:
    """Everything that two equal runs have equal, but for the clock."""
    cost = {name: value for name, value in vars(method.rollout_cost).items() if "seconds" not in name}
    counters = ("rows_seen", "tokens_seen", "teacher_rows", "teacher_tokens", "update_flops", "teacher_flops")
    streaks = method._own_words.state_dict()["streaks"]
    return {**cost, **{name: getattr(method, name) for name in counters}, **streaks}


@pytest.fixture(scope="module")
def whole(words: Any) -> Any:
    @lru_cache
    def ends(name: str) -> tuple[torch.Tensor, list[float], dict[str, Any]]:
        method, watch = run(words, name, [], seed=7)
        assert len(watch.losses) == STEPS * MICRO_BATCHES
        return words.flat(list(method.student.parameters())), watch.losses, told(words, method)

    return ends


def assert_goes_on_exactly(words: Any, whole: Any, name: str, folder: Path) -> int:
    """Resumed where random numbers are elsewhere: weights, every loss to come, and all that is counted."""
    weights, losses, counted = whole(name)
    last = folder / "last.ckpt"
    method, watch = run(words, name, [], 99 if last.exists() else 7, last if last.exists() else None)
    assert watch.losses == losses[len(losses) - len(watch.losses) :]
    assert torch.equal(words.flat(list(method.student.parameters())), weights)
    assert told(words, method) == counted
    return len(watch.losses)


def test_the_setting_has_what_could_go_wrong(words: Any, whole: Any) -> None:
    """Other random numbers end elsewhere, since dropout is on; and the coin falls both ways."""
    method, _ = run(words, "mixed", [], seed=8)
    assert not torch.equal(words.flat(list(method.student.parameters())), whole("mixed")[0])
    data = words.make_data(num_train=10, num_prompts=4, steps_per_rollout=2, num_stored=3, seed=4)
    mixed = make(words, "mixed")
    words.fit(mixed, data, max_steps=0)
    assert {mixed.is_on_policy(block) for block in range(6)} == {True, False}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of plain containers; anything but plain values fails."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
    else:
        assert value is None or isinstance(value, bool | int | float | str), value


# Micro-batches: in the first step, in a block's first and second step, at the end of an epoch, at the start of one.
CALLS = (2, *(pytest.param(call, marks=pytest.mark.slow) for call in (3, 8, 12)), 13, 22)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("call", CALLS)
def test_p81_p83_an_error_within_a_step(words: Any, whole: Any, tmp_path: Path, name: str, call: int) -> None:
    """The whole step comes again, whichever of its micro-batches it broke off in."""
    with pytest.raises(Boom):
        run(words, name, [Explode(call, before_forward=call % 2 == 0), KeepLast(tmp_path)], seed=7)
    done = assert_goes_on_exactly(words, whole, name, tmp_path)
    assert done == (STEPS - (call - 1) // MICRO_BATCHES) * MICRO_BATCHES


@pytest.mark.parametrize("name", METHODS)
def test_p81_p83_a_kill_at_any_step(words: Any, whole: Any, tmp_path: Path, name: str) -> None:
    """From the file of every step of one run, as a kill leaves it; half of them lie within a block."""
    kept = tmp_path / "kept"

    class Copy(L.Callback):
        """Keeps what `last.ckpt` is when each step begins."""

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if (tmp_path / "last.ckpt").exists():
                (kept / str(trainer.global_step)).mkdir(parents=True, exist_ok=True)
                shutil.copy(tmp_path / "last.ckpt", kept / str(trainer.global_step))

    run(words, name, [KeepNoException(tmp_path, every_n_steps=1), Copy()], seed=7)
    assert {int(folder.name) for folder in kept.iterdir()} == set(range(1, STEPS))
    for folder in sorted(kept.iterdir())[:: 3 if name == "sampled_token" else 1]:
        steps_left = STEPS - int(torch.load(folder / "last.ckpt", weights_only=True)["global_step"])
        assert assert_goes_on_exactly(words, whole, name, folder) == steps_left * MICRO_BATCHES


@pytest.mark.parametrize("name", METHODS)
def test_p83_p84_what_a_checkpoint_holds(words: Any, tmp_path: Path, name: str) -> None:
    """The student, its optimizer, the block that serves and the counters: no teacher, no start, plain values."""
    with pytest.raises(Boom):
        run(words, name, [Explode(8, before_forward=True), KeepLast(tmp_path)], seed=7)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    parameters = {f"student.{key}" for key in make(words, name).student.state_dict()}
    assert set(checkpoint["state_dict"]) == parameters and checkpoint["global_step"] == 3
    tensors = [one for state in checkpoint["optimizer_states"][0]["state"].values() for one in state.values()]
    assert len(tensors) == 3 * len(parameters)
    rollouts = checkpoint["own_words"]["rollouts"]
    assert set(rollouts) == {"block", "drawn", "sampling"} and rollouts["block"] <= 1
    del checkpoint["state_dict"], checkpoint["optimizer_states"]
    (random_state,) = (tensor for tensor in tensors_in(checkpoint) if tensor.ndim)
    assert random_state.shape == torch.get_rng_state().shape, "no other weights"
