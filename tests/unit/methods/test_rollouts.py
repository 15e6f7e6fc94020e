"""Who teaches, what it reads, and how the student's own words are drawn."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from research.errors import CheckpointError, ConfigError, RolloutError
from research.teachers.top_k import keep_top_k
from research.text.encoder import TextEncoder

pytestmark = pytest.mark.filterwarnings("ignore")
# -- who teaches, and what it reads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "top_k", "heat"),
    [("divergence", None, 1.0), ("divergence", 3, 1.0), ("divergence", None, 0.7), ("sampled_token", None, 0.7)],
)
def test_the_same_model_teaches_nothing(words: Any, objective: str, top_k: int | None, heat: float) -> None:
    """Teacher and student with equal weights in float32: loss 0 and gradient 0 through the whole method."""
    data, watch = words.make_data(), words.Watch()
    student, twin = (words.make_network(data).float() for _ in range(2))
    options = {"objective": objective, "teacher_top_k": top_k, "sampling_temperature": heat}
    method = words.make_on_policy(data, words.make_teacher(data, twin), student, **options)
    gradient = words.flat(words.step_of(method, data, 2, callbacks=[watch]))
    assert max(map(abs, watch.losses)) < 1e-6 and float(gradient.abs().max()) < 1e-5


@pytest.mark.parametrize("objective", ["divergence", "sampled_token"])
def test_p27_another_teacher_changes_loss_and_gradient(words: Any, objective: str) -> None:
    data, losses, gradients = words.make_data(), [], []
    for seed in (1, 2):
        watch, teacher = words.Watch(), words.make_teacher(data, words.make_network(data, seed))
        method = words.make_on_policy(data, teacher, objective=objective)
        gradients.append(words.flat(words.step_of(method, data, callbacks=[watch])))
        losses += watch.losses
    assert abs(losses[0] - losses[1]) > 1e-3 and float((gradients[0] - gradients[1]).abs().max()) > 1e-3


def test_p41_the_teacher_reads_the_same_ids_behind_its_own_prompt(words: Any) -> None:
    """Two templates: the step is the loop's with the teacher's own prompts, and not with the student's."""
    data = words.make_data(teacher_template=words.Bare(":;"))
    method = words.make_on_policy(data)
    gradient = words.step_of(method, data, 2)
    rows = words.rows_of(method, data)
    assert all(len(teacher) == len(own) + 1 and teacher[:-2] == own[:-1] for own, teacher, _, _ in rows)
    words.assert_same(gradient, words.loop(data, rows, lambda p, q: words.kl(q, p)))
    wrong = words.loop(data, [(own, own, *rest) for own, _, *rest in rows], lambda p, q: words.kl(q, p))
    assert float((words.flat(gradient) - words.flat(wrong)).abs().max()) > 1e-3


def test_p41_the_same_model_under_the_same_template(words: Any) -> None:
    data, watch = words.make_data(teacher_template=words.Bare()), words.Watch()
    method = words.make_on_policy(data, words.make_teacher(data, words.make_network(data)))
    words.step_of(method, data, callbacks=[watch])
    assert abs(watch.losses[0]) < 1e-6


def test_p40_completions_are_never_encoded_again(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 rollouts: the ids that are scored are those that were drawn, and the tokenizer is asked for none of them."""
    data = words.make_data(num_train=50, num_prompts=50, num_val=0)
    data.setup()
    method, scored, encoded = words.make_on_policy(data, num_samples=10), [], []
    signal_at = method.teacher.signal_at

    def listening(batch: Any, place_BT: Tensor) -> Any:
        for index, label_T, mask_T in zip(batch.index_D, batch.label_BT, batch.completion_BT, strict=True):
            scored.append((int(index), label_T[mask_T].tolist()))
        return signal_at(batch, place_BT)

    monkeypatch.setattr(method.teacher, "signal_at", listening)
    encode = TextEncoder._encode
    monkeypatch.setattr(TextEncoder, "_encode", lambda self, text: (encoded.append(text), encode(self, text))[1])
    words.step_of(method, data)
    drawn = words.rollouts_of(method)
    assert len(scored) == 500 and sorted(scored) == sorted((n, list(one.ids)) for n in drawn for one in drawn[n])
    assert not encoded
    data.codec.prompt_ids("12")
    assert encoded == ["12="], "the spy stands where text is encoded"


@pytest.mark.parametrize("extra", [8, 136])
def test_p18_padded_heads_change_nothing(words: Any, extra: int) -> None:
    """Rows that stand for no token, student and teacher by different numbers, with logits that would win every draw."""
    data, size, ends = words.make_data(), words.make_data().codec.vocab_size, []
    for pad in (0, extra):
        networks = []
        for seed in (0, 1):
            network = words.make_network(data, seed, vocab_size=size + pad * (1 + seed))
            state = network.state_dict()
            for name, tensor in words.make_network(data, seed).state_dict().items():
                state[name][: len(tensor)] = tensor
                state[name][len(tensor) :] = 5.0 * state[name][:1]
            network.load_state_dict(state)
            networks.append(network)
        method = words.make_on_policy(data, words.make_teacher(data, networks[1]), networks[0])
        gradient = words.step_of(method, data, 2)
        rows = [len(parameter) for parameter in words.make_network(data).parameters()]
        assert not any(part[num:].any() for part, num in zip(gradient, rows, strict=True))
        ends.append(words.flat([part[:num] for part, num in zip(gradient, rows, strict=True)]))
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


def test_a_signal_that_was_cut_already_is_not_cut_again(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three probabilities from the teacher, or from all its logits: the same step."""
    data = words.make_data()
    gradients = [words.step_of(words.make_on_policy(data, teacher_top_k=3), data)]
    teacher = words.make_teacher(data)
    signal_at = teacher.signal_at
    monkeypatch.setattr(teacher, "signal_at", lambda batch, place_BT: keep_top_k(signal_at(batch, place_BT), 3))
    gradients.append(words.step_of(words.make_on_policy(data, teacher), data))
    words.assert_same(gradients[1], gradients[0])
    with pytest.raises(ConfigError, match=r"method.teacher_top_k is 2, and this teacher gives its 3 largest"):
        words.step_of(words.make_on_policy(data, teacher, teacher_top_k=2), data)


# -- sampling ---------------------------------------------------------------------------------------------------------


def replayed(words: Any, data: Any, drawn: dict[str, Any], **options: Any) -> tuple[float, Tensor]:
    """Loss and gradient on rollouts that are given, however they were drawn."""
    method, watch = words.make_on_policy(data, **options), words.Watch()
    rollouts = {key: value for key, value in drawn["rollouts"].items() if key != "sampling"}
    method._own_words.load_state_dict({**drawn, "rollouts": rollouts})
    gradient = words.flat(words.step_of(method, data, callbacks=[watch]))
    assert words.rollouts_of(method) == drawn["check"]
    return watch.losses[0], gradient


def test_p16_sampling_and_distillation_temperature_are_two_things(words: Any) -> None:
    """On fixed rollouts the sampling temperature leaves the divergence bit-equal; the other one changes it."""
    data = words.make_data()
    method = words.make_on_policy(data)
    words.step_of(method, data)
    drawn = {**method._own_words.state_dict(), "check": words.rollouts_of(method)}
    loss, gradient = replayed(words, data, drawn)
    for options in ({"sampling_temperature": 0.5}, {"sampling_temperature": 0.0}, {"top_p": 0.5}):
        same = replayed(words, data, drawn, **options)
        assert same[0] == loss and torch.equal(same[1], gradient), options
    softer = replayed(words, data, drawn, temperature=2.0)
    assert abs(softer[0] - loss) > 1e-3 and not torch.allclose(softer[1], gradient)
    hot = words.make_on_policy(data, sampling_temperature=2.0)
    words.step_of(hot, data)
    assert words.rollouts_of(hot) != drawn["check"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_samples": 4}, r"method.num_samples 2, now 4; go on"),
        ({"num_samples": 3}, r"method.num_samples 2, now 3; go on"),
        ({"sampling_temperature": 0.5}, r"method.sampling_temperature 1.0, now 0.5; go on"),
    ],
    ids=str,
)
def test_a_block_goes_on_as_it_was_drawn_or_not_at_all(
    words: Any, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    """Two samples a problem would be compared as four of another; at the end of a block a change is free."""
    data, ends = words.make_data(steps_per_rollout=2), {}
    for steps in (1, 2):
        trainer = words.fit(words.make_on_policy(data, lr=0.01, num_samples=2), data, max_steps=steps)
        ends[steps] = tmp_path / f"{steps}.ckpt"
        trainer.save_checkpoint(ends[steps])

    def gone_on(steps: int, **options: Any) -> Any:
        method = words.make_on_policy(data, lr=0.01, **{"num_samples": 2, **options})
        trainer = words.make_trainer(max_steps=4)
        trainer.fit(method, datamodule=data, ckpt_path=ends[steps], weights_only=True)
        return method

    with pytest.raises(CheckpointError, match=told):
        gone_on(1, **changes)
    kept = torch.load(ends[1], weights_only=True)["own_words"]
    other = words.make_on_policy(data, **{"num_samples": 2, **changes})
    other._own_words.load_state_dict(kept)
    assert other._own_words.state_dict()["rollouts"] == kept["rollouts"], "saved again before it is looked at"
    for steps, options in ((1, {}), (2, changes)):
        drawn = words.rollouts_of(gone_on(steps, **options))
        assert all(len(samples) == {"num_samples": 2, **options}["num_samples"] for samples in drawn.values())


POSITIONS = {
    "student": ({"max_positions": 9}, {}, r"rollouts end after 4 tokens: the student's positions less"),
    "teacher": ({}, {"max_positions": 10}, r"rollouts end after 4 tokens: the teacher's positions less"),
    "neither": ({}, {}, None),
}


@pytest.mark.parametrize("short", POSITIONS)
def test_rollouts_end_where_a_model_s_positions_do(words: Any, short: str, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts of up to five tokens, six as the teacher reads them; no document is too long for either."""
    own, its, told = POSITIONS[short]
    data = words.make_data(teacher_template=words.Bare(":;"))
    teacher = words.make_teacher(data, words.make_network(data, 1, **its))
    method = words.make_on_policy(data, teacher, words.make_network(data, **own), num_samples=4)
    with caplog.at_level("INFO", logger="research"):
        words.step_of(method, data)
    longest = max(len(one.ids) for samples in words.rollouts_of(method).values() for one in samples)
    assert longest == (8 if told is None else 4)
    assert (told is None) != (re.search(str(told), caplog.text) is not None)


def test_a_prompt_without_room_behind_it_is_refused_before_the_first_step(words: Any) -> None:
    data = words.make_data(teacher_template=words.Bare(":;"))
    for own, its, told in (({"max_positions": 5}, {}, "5 tokens, and the student's positions are 5"),
                           ({}, {"max_positions": 6}, "6 tokens, and the teacher's positions are 6")):  # fmt: skip
        teacher = words.make_teacher(data, words.make_network(data, 1, **its))
        with pytest.raises(ConfigError, match=told):
            words.step_of(words.make_on_policy(data, teacher, words.make_network(data, **own)), data)


def test_stored_traces_too_long_for_the_teacher_are_refused_before_the_first_step(words: Any) -> None:
    data = words.make_data(num_stored=8, teacher_template=words.Bare(":;"))
    teacher = words.make_teacher(data, words.make_network(data, 1, max_positions=11))
    lengths = [len(row.teacher_prompt_ids) + len(row.ids) - row.prompt_length for row in data.stored_rows()]
    told = rf"{sum(length > 11 for length in lengths)} of 8 stored traces are longer than the teacher's 11 positions"
    assert 0 < sum(length > 11 for length in lengths) < 8
    with pytest.raises(ConfigError, match=told):
        words.step_of(words.make_on_policy(data, teacher, on_policy_fraction=0.5), data)
    longest = max(len(row.ids) for row in data.stored_rows())
    student = words.make_network(data, max_positions=longest - 1)
    with pytest.raises(
        ConfigError, match=f"than the student's {longest - 1} positions as it reads them, up to {longest}"
    ):
        words.step_of(words.make_on_policy(data, student=student, on_policy_fraction=0.5), data)


def test_p60_a_model_s_own_generation_config_changes_nothing(words: Any) -> None:
    """Penalties, top-k and a temperature in the model's files: the same rollouts, scored as they were drawn."""
    data, ends = words.make_data(), []
    for penalty in (None, 1.1):
        student = words.make_network(data)
        if penalty:
            student.model.generation_config.update(
                repetition_penalty=penalty, top_k=2, temperature=0.3, do_sample=True, min_p=0.5
            )
        method = words.make_on_policy(data, student=student, num_samples=4)
        words.step_of(method, data, log_every_n_steps=1)
        ends.append(words.rollouts_of(method))
    assert ends[0] == ends[1]
    network = words.make_network(data)
    for prompt, _, completion, sampled in words.rows_of(method, data):
        logprobs = words.logits_after(network, prompt, completion, words.V).log_softmax(-1)
        assert logprobs[torch.arange(len(completion)), torch.tensor(completion)].tolist() == pytest.approx(
            sampled, abs=1e-4
        )


def test_p60_a_sampler_that_is_not_the_policy_is_refused(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method itself compares both probabilities of every token, in eval mode, before the first step."""
    from research.generation import decoding

    draw = decoding.draw

    def penalised(logits_BV: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return draw(torch.where(logits_BV > 0, logits_BV / 1.1, logits_BV * 1.1), *rest)

    monkeypatch.setattr(decoding, "draw", penalised)
    data = words.make_data()
    with pytest.raises(RolloutError, match="it does not sample the policy that is trained"):
        words.step_of(words.make_on_policy(data), data)


def test_p62_samples_that_are_too_old_stop_the_run(words: Any) -> None:
    """At a large rate the distance rises step by step, is logged, and ends the run once it is beyond the bound."""
    data = words.make_data(steps_per_rollout=4)

    watch = words.Watch()
    words.fit(
        words.make_on_policy(data, lr=0.05, max_sampler_kl=1e6, num_samples=8),
        data,
        max_steps=4,
        callbacks=[watch],
        log_every_n_steps=1,
    )
    gaps = [told["rollout/sampler_kl"] for told in watch.logged]
    assert 0 <= gaps[0] < 1e-12 and 1e-4 < gaps[1] < gaps[2] < gaps[3]
    bound = (gaps[1] + gaps[2]) / 2
    with pytest.raises(RolloutError, match=rf"2 steps ago, more than method.max_sampler_kl={bound:g}"):
        words.fit(words.make_on_policy(data, lr=0.05, max_sampler_kl=bound, num_samples=8), data, max_steps=4)


def test_p65_rollouts_are_written_in_eval_mode_and_training_goes_on_in_its_own(words: Any) -> None:
    """Dropout of a half: rollouts are those of the network without it, carry no gradient, and leave modes alone."""
    data, drawn = words.make_data(), []
    for dropout in (0.0, 0.5):
        student = words.make_network(data, dropout=dropout)
        method = words.make_on_policy(data, student=student)
        trainer = words.make_trainer(max_steps=0)
        trainer.fit(method, datamodule=data)
        method.train()
        method.student.model.model.norm.eval()
        modes = [module.training for module in method.student.modules()]
        batch = next(iter(data.train_dataloader()))
        state = torch.get_rng_state()
        step = method._own_words.of(batch, torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), state), "rollouts draw from a stream of their own"
        assert [module.training for module in method.student.modules()] == modes
        assert torch.is_grad_enabled() and not step.tokens.ids_BT.is_floating_point()
        logprob_N = method._own_words.logprobs(torch.zeros(int(step.tokens.completion_BT.sum()), words.V), step)
        assert method._own_words.compare(logprob_N, step, batch).grad_fn is None
        drawn.append(words.rollouts_of(method))
    assert drawn[0] == drawn[1]


def test_p65_the_next_rollouts_follow_the_new_weights(words: Any) -> None:
    data = words.make_data()
    method, again, watch = words.make_on_policy(data, lr=0.1), words.make_on_policy(data, lr=0.1), words.Watch()
    words.fit(method, data, max_steps=1)
    after_one = words.make_network(data)
    after_one.load_state_dict(method.student.state_dict())
    words.fit(again, data, max_steps=2, callbacks=[watch])
    for prompt, _, completion, sampled in words.rows_of(again, data):
        logprobs = words.logits_after(after_one, prompt, completion, words.V).log_softmax(-1)
        assert logprobs[torch.arange(len(completion)), torch.tensor(completion)].tolist() == pytest.approx(
            sampled, abs=1e-5
        )
    first = words.make_network(data)
    old = words.logits_after(first, prompt, completion, words.V).log_softmax(-1)
    assert old[torch.arange(len(completion)), torch.tensor(completion)].tolist() != pytest.approx(sampled, abs=1e-5)


def test_rollouts_follow_the_seed_and_differ_from_block_to_block(words: Any) -> None:
    ends = []
    for seed in (0, 0, 1):
        data, watch = words.make_data(seed=seed), words.Watch()
        method = words.make_on_policy(data, lr=0.0)
        torch.manual_seed(len(ends))  # the process's own random numbers have no part in it
        words.fit(method, data, max_steps=2, callbacks=[watch])
        ends.append(watch.rollouts)
    assert ends[0] == ends[1] and ends[0] != ends[2] and ends[0][0] != ends[0][1]
