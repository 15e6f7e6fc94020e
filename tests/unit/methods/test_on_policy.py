"""On-policy distillation against a float64 loop over single documents."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from research.errors import ConfigError, NonFiniteLoss
from research.methods.sft_trace import SftTrace

pytestmark = pytest.mark.filterwarnings("ignore")

Formula = Callable[[Tensor, Tensor], Tensor]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def mixed(p: Tensor, q: Tensor, weight: float) -> Tensor:
    return (weight * p.exp() + (1 - weight) * q.exp()).log()


# by hand, from logprobs of teacher and student: [T, V], [T, V] -> [T]
FORMULAS: dict[str, tuple[dict[str, float], Formula]] = {
    "forward_kl": ({}, lambda p, q: kl(p, q)),
    "reverse_kl": ({}, lambda p, q: kl(q, p)),
    "jsd": (
        {"teacher_mixture_weight": 0.3},
        lambda p, q: 0.3 * kl(p, mixed(p, q, 0.3)) + 0.7 * kl(q, mixed(p, q, 0.3)),
    ),
    "normalised_jsd": (
        {"teacher_mixture_weight": 0.3},
        lambda p, q: (0.3 * kl(p, mixed(p, q, 0.3)) + 0.7 * kl(q, mixed(p, q, 0.3))) / 0.21,
    ),
    "skewed_forward_kl": ({"skew_weight": 0.1}, lambda p, q: kl(p, mixed(p, q, 0.1))),
    "skewed_reverse_kl": ({"skew_weight": 0.1}, lambda p, q: kl(q, mixed(p, q, 0.9))),
    "total_variation": ({}, lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2),
}


# -- the gradient of one step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", FORMULAS)
def test_p02_p44_p45_every_divergence_has_the_loop_s_gradient(words: Any, divergence: str) -> None:
    """Two samples of each problem, in one micro-batch and in four; the denominator is every generated token."""
    options, formula = FORMULAS[divergence]
    data = words.make_data()
    for parts in (1, 4):
        method = words.make_on_policy(data, divergence=divergence, num_samples=2, temperature=1.5, **options)
        gradient = words.step_of(method, data, parts)
        rows = words.rows_of(method, data)
        assert len(rows) == 16 and len({len(row[2]) for row in rows}) > 3 and len({len(row[0]) for row in rows}) > 2
        words.assert_same(gradient, words.loop(data, rows, formula, temperature=1.5))


def test_p35_prompts_of_many_lengths_lose_no_token(words: Any) -> None:
    """Every drawn token is one place of the batch, with the token before it as its input, whoever stands beside it."""
    data = words.make_data()
    method = words.make_on_policy(data)
    words.step_of(method, data)
    batch, rows = method._trained, words.rows_of(method, data)
    by_index = {int(index): place for place, index in enumerate(batch.index_D)}
    for (prompt, _, completion, _), index in zip(rows, words.rollouts_of(method), strict=True):
        place = by_index[index]
        where = batch.completion_BT[place].nonzero().squeeze(-1).tolist()
        assert batch.label_BT[place][where].tolist() == list(completion)
        assert where == list(range(len(prompt) - 1, len(prompt) - 1 + len(completion)))
        assert batch.ids_BT[place, : len(prompt) + len(completion)].tolist() == [*prompt, *completion]


def test_the_fixed_reduction_divides_by_rows_and_a_constant(words: Any) -> None:
    data = words.make_data()
    method = words.make_on_policy(data, reduction="fixed", fixed_length=5)
    gradient = words.step_of(method, data, 2)
    expected = words.loop(data, words.rows_of(method, data), lambda p, q: kl(q, p), reduction="fixed", fixed_length=5)
    words.assert_same(gradient, expected)


@pytest.mark.parametrize("top_k", [3, 50])
def test_p19_top_k_and_a_bucket_for_the_rest(words: Any, top_k: int) -> None:
    """K+1 buckets by hand; with K above the vocabulary it is the dense divergence."""
    data = words.make_data()
    method = words.make_on_policy(data, teacher_top_k=top_k)
    gradient = words.step_of(method, data)

    def formula(p: Tensor, q: Tensor) -> Tensor:
        if top_k >= p.shape[-1]:
            return kl(q, p)
        ids = p.topk(top_k).indices
        rest = torch.ones_like(p, dtype=torch.bool).scatter(-1, ids, False)
        p, q = (torch.cat([x.gather(-1, ids), x.masked_fill(~rest, -math.inf).logsumexp(-1, True)], -1) for x in (p, q))
        return kl(q, p)

    words.assert_same(gradient, words.loop(data, words.rows_of(method, data), formula))


@pytest.mark.parametrize("reduction", ["token", "sequence", "fixed"])
@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_p58_the_sampled_token_objective_by_hand(words: Any, credit: str, reduction: str) -> None:
    """``-A log q`` with ``A = log p - log q`` held fixed, at the sampling temperature on both sides."""
    data, heat = words.make_data(), 1.4
    fixed = {"fixed_length": 5} if reduction == "fixed" else {}
    options = {"sampling_temperature": heat, "credit": credit, "reduction": reduction, "num_samples": 2, **fixed}
    for parts in (1, 4):
        method = words.make_on_policy(data, objective="sampled_token", **options)
        gradient = words.step_of(method, data, parts)
        student, teacher = words.make_network(data), words.make_network(data, seed=1)
        values, rows = [], words.rows_of(method, data)
        for prompt, teacher_prompt, completion, sampled in rows:
            at = torch.arange(len(completion)), torch.tensor(completion)
            q = (words.logits_after(student, prompt, completion, words.V) / heat).log_softmax(-1)[at]
            raw = words.logits_after(teacher, teacher_prompt, completion, words.V).float().double()
            p = (raw / heat).log_softmax(-1)[at]
            assert q.tolist() == pytest.approx(sampled, abs=1e-6)
            advantage = (p - q).detach()
            if credit == "sequence":
                advantage = advantage.flip(0).cumsum(0).flip(0)
            values.append(-advantage * q)
        loss = {
            "token": torch.cat(values).mean(),
            "sequence": torch.stack([value.mean() for value in values]).mean(),
            "fixed": torch.cat(values).sum() / (len(values) * 5),
        }[reduction]
        words.assert_same(gradient, words.gradient_of(loss, student))


def test_a_reward_beside_the_divergence_is_grpo_s(words: Any) -> None:
    """The soft term and the reward have weights and denominators of their own, on the same rollouts."""
    data = words.make_data()
    method = words.make_on_policy(data, reward_weight=0.5, soft_weight=2.0, num_samples=4)
    gradient = words.step_of(method, data, 2)
    student, teacher = words.make_network(data), words.make_network(data, seed=1)
    soft, policy, prompts = [], [], {row.problem.index: row.ids for row in data.prompts()}
    for index, drawn in words.rollouts_of(method).items():
        rewards = torch.tensor([float(words.is_right(one)) for one in drawn])
        spread = rewards.std() + 1e-6
        for reward, one in zip(rewards, drawn, strict=True):
            logits = words.logits_after(student, prompts[index], one.ids, words.V).log_softmax(-1)
            p = words.logits_after(teacher, prompts[index], one.ids, words.V).float().double().log_softmax(-1).detach()
            soft.append(kl(logits, p))
            drawn_logprobs = logits[torch.arange(len(one.ids)), torch.tensor(one.ids)]
            policy.append(-float((reward - rewards.mean()) / spread) * drawn_logprobs)
    loss = 2.0 * torch.cat(soft).mean() + 0.5 * torch.cat(policy).mean()
    words.assert_same(gradient, words.gradient_of(loss, student), rtol=1e-4)


def test_several_steps_on_one_set_of_rollouts(words: Any) -> None:
    """The second step has the first one's rollouts, and the gradient of the weights as they are by then."""
    data = words.make_data(steps_per_rollout=2)
    student, watch = words.make_network(data), words.Watch()
    method = words.make_on_policy(data, student=student, lr=0.01)
    words.fit(method, data, max_steps=2, callbacks=[watch], log_every_n_steps=1)
    assert watch.rollouts[0] == watch.rollouts[1]
    rows, replayed = words.rows_of(method, data), words.make_network(data)
    for _ in range(2):
        gradient = words.loop(data, rows, lambda p, q: kl(q, p), student=replayed)
        with torch.no_grad():
            for parameter, slope in zip(replayed.parameters(), gradient, strict=True):
                parameter -= 0.01 * slope
                parameter.grad = None
    words.assert_same(list(student.parameters()), list(replayed.parameters()), rtol=1e-7)
    assert [told["rollout/staleness"] for told in watch.logged] == [0, 1]


@pytest.mark.parametrize("objective", ["divergence", "sampled_token"])
def test_p52_a_hidden_signal_gives_the_dense_one_s_step(words: Any, objective: str) -> None:
    """Neither side's logits written out: loss, gradient and logs are the same, on own words and on stored traces."""
    for fraction in (1.0, 0.0):
        data, steps, logged = words.make_data(num_stored=8), [], []
        for kind in ("dense", "hidden"):
            teacher, watch = words.make_teacher(data, signal=kind), words.Watch()
            options = {"on_policy_fraction": fraction, "hard_weight": 0.0 if fraction else 0.5}
            method = words.make_on_policy(data, teacher, objective=objective, **options)
            steps.append(words.step_of(method, data, 2, log_every_n_steps=1, callbacks=[watch], logger=False))
            logged.append(watch.logged[-1])
        words.assert_same(steps[1], steps[0])
        assert logged[1] == pytest.approx(logged[0], rel=1e-5, abs=1e-6)
        assert ("rollout/entropy" in logged[1]) == (fraction == 1)


@pytest.mark.parametrize("kind", ["dense", "hidden"])
@pytest.mark.parametrize("fraction", [1.0, 0.0], ids=["own words", "stored traces"])
@pytest.mark.parametrize("divergence", [*FORMULAS, "sampled_token"])
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(
    words: Any, divergence: str, fraction: float, kind: str
) -> None:
    """Loss and gradient are zero in float32, and with another teacher they are not."""
    data = words.make_data(num_stored=8)
    options = {"objective": divergence} if divergence == "sampled_token" else {"divergence": divergence}
    options |= {"on_policy_fraction": fraction, **FORMULAS.get(divergence, ({}, None))[0]}
    found = {}
    for seed in (0, 1):
        teacher, watch = (
            words.make_teacher(data, words.make_network(data, seed=seed).float(), signal=kind),
            words.Watch(),
        )
        method = words.make_on_policy(data, teacher, words.make_network(data).float(), **options)
        gradient = words.step_of(method, data, 2, log_every_n_steps=1, callbacks=[watch])
        found[seed] = max(float(part.abs().max()) for part in gradient), abs(watch.logged[-1]["train/loss"])
    assert max(found[0]) < 1e-6 and min(found[1]) > 1e-3


# -- stored traces, and the coin --------------------------------------------------------------------------------------


def test_off_policy_steps_have_the_loop_s_gradient_on_stored_traces(words: Any) -> None:
    data = words.make_data(num_stored=8, teacher_template=words.Bare(":;"))
    options = {"on_policy_fraction": 0.0, "soft_weight": 2.0, "hard_weight": 0.5, "temperature": 1.5}
    student, teacher = words.make_network(data), words.make_network(data, seed=1)
    soft, hard = [], []
    for prompt, teacher_prompt, completion, _ in words.stored_of(data):
        logits = words.logits_after(student, prompt, completion, words.V)
        raw = words.logits_after(teacher, teacher_prompt, completion, words.V).float().double().detach()
        soft.append(1.5**2 * words.kl((logits / 1.5).log_softmax(-1), (raw / 1.5).log_softmax(-1)))
        hard.append(-logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)])
    loss = 2.0 * torch.cat(soft).mean() + 0.5 * torch.cat(hard).mean()
    expected = words.gradient_of(loss, student)
    for parts in (1, 4):
        words.assert_same(words.step_of(words.make_on_policy(data, **options), data, parts), expected)
    fixed = words.step_of(words.make_on_policy(data, **options, reduction="fixed", fixed_length=5), data)
    places = sum(len(value) for value in hard)
    words.assert_same(fixed, [part * places / (8 * 5) for part in expected])


def test_p57_the_student_s_own_words_are_never_a_label(words: Any) -> None:
    """On-policy steps of a mixed run are bit-equal with and without a cross-entropy; its off-policy steps are not."""
    data = words.make_data(num_stored=8)
    seen = {True: 0, False: 0}
    for seed in range(6):
        data.seed, ends = seed, []
        for hard_weight in (0.0, 3.0):
            method = words.make_on_policy(data, on_policy_fraction=0.5, hard_weight=hard_weight)
            ends.append(words.flat(words.step_of(method, data, 2)))
        assert torch.equal(*ends) == method.is_on_policy(0)
        seen[method.is_on_policy(0)] += 1
    assert min(seen.values()) > 0


def test_p54_the_coin_is_of_seed_and_block_alone(words: Any) -> None:
    """50 decisions: equal whatever the process drew before, near the asked share, and others for another seed."""
    tossed = []
    for seed, fraction in ((0, 0.5), (0, 0.5), (1, 0.5), (0, 0.0), (0, 1.0), (0, 0.1)):
        data = words.make_data(seed=seed, num_stored=8)
        method = words.make_on_policy(data, on_policy_fraction=fraction)
        words.fit(method, data, max_steps=0)
        torch.manual_seed(len(tossed))
        tossed.append([method.is_on_policy(block) for block in range(50)])
    half, again, other, never, always, seldom = tossed
    assert half == again != other and 15 <= sum(half) <= 35
    assert not any(never) and all(always) and 0 < sum(seldom) < sum(half)


def test_the_blocks_of_a_mixed_run_are_what_the_coin_says(words: Any) -> None:
    data, watch = words.make_data(num_stored=8, steps_per_rollout=2), words.Watch()
    method = words.make_on_policy(data, lr=0.01, on_policy_fraction=0.5)
    words.fit(method, data, max_steps=16, callbacks=[watch], log_every_n_steps=1)
    own = [step for step in range(16) if method.is_on_policy(step // 2)]
    assert 0 < len(own) < 16 and len({str(watch.rollouts[step]) for step in own}) == len(own) / 2
    names = ("train/soft", "train/soft_stored")
    for step in range(1, 16):
        changed = [watch.logged[step].get(name) != watch.logged[step - 1].get(name) for name in names]
        assert changed == [step in own, step not in own]
    assert method.rows_seen == method.teacher_rows == 16 * 8


# -- bad input --------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"objective": "kl"}, "method.objective is 'kl'; expected one of divergence, sampled_token"),
    ({"divergence": "jsd"}, "teacher_mixture_weight"),
    ({"temperature": 0.0}, "method.temperature is 0.0"),
    ({"objective": "sampled_token", "temperature": 2.0}, "method.temperature 2.0 with objective=sampled_token"),
    ({"objective": "sampled_token", "divergence": "forward_kl"}, "method.divergence is forward_kl"),
    ({"objective": "sampled_token", "top_p": 0.9}, "samples of the policy itself"),
    ({"objective": "sampled_token", "sampling_temperature": 0.0}, "samples of the policy itself"),
    ({"reward_weight": 1.0, "num_samples": 2, "top_p": 0.9}, "samples of the policy itself"),
    ({"reward_weight": 1.0}, "method.reward_weight is 1.0 with num_samples=1"),
    ({"step_reward": 0.5}, "method.step_reward is 0.5 with reward_weight=0"),
    ({"credit": "sequence"}, "belong to objective=sampled_token"),
    ({"advantage_bound": 1.0}, "belong to objective=sampled_token"),
    ({"objective": "sampled_token", "credit": "episode"}, "credit='episode'"),
    ({"clip_low": 0.0}, "clip_low=0.0"),
    ({"clip_high": 0.2}, "method.clip_high belong to objective=sampled_token and to a reward"),
    ({"teacher_top_k": 0}, "method.teacher_top_k is 0"),
    ({"reduction": "sequence"}, "method.reduction is 'sequence'; expected one of token, fixed"),
    ({"objective": "sampled_token", "reduction": "sequence", "on_policy_fraction": 0.5}, "one of token, fixed$"),
    ({"reduction": "fixed"}, "method.fixed_length is None"),
    ({"fixed_length": 3}, "method.fixed_length is 3"),
    ({"on_policy_fraction": 1.5}, "method.on_policy_fraction is 1.5"),
    ({"on_policy_fraction": 0.5}, "data.num_stored is 0"),
    ({"hard_weight": 1.0}, "method.hard_weight is 1.0 with on_policy_fraction=1"),
    ({"soft_weight": 0.0, "hard_weight": 1.0, "on_policy_fraction": 0.5}, "they would teach nothing"),
    ({"soft_weight": 0.0, "reward_weight": 1.0, "num_samples": 2, "on_policy_fraction": 0.5}, "stored traces would"),
    ({"soft_weight": -1.0}, "method.soft_weight is -1.0"),
    ({"soft_weight": 0.0}, "are all 0"),
    ({"num_samples": 0}, "num_samples is 0"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_sampler_kl": 0.0}, "method.max_sampler_kl is 0.0"),
    ({"max_truncated_share": 0.0}, "method.max_truncated_share is 0.0"),
    ({"patience": 0}, "method.patience is 0"),
]


@pytest.mark.parametrize(("options", "told"), BAD, ids=[told for _, told in BAD])
def test_bad_options_are_refused_before_the_first_step(words: Any, options: dict[str, Any], told: str) -> None:
    data = words.make_data()
    with pytest.raises(ValueError, match=told):
        words.step_of(words.make_on_policy(data, **options), data)


def test_it_needs_a_teacher_and_prompts(words: Any) -> None:
    data, rows = words.make_data(), words.make_data(num_prompts=0, batch_size=8)
    with pytest.raises(ConfigError, match="needs a teacher; choose one with teacher=frozen or teacher=served"):
        words.OnPolicy(words.make_training(data))
    with pytest.raises(ConfigError, match=r"these data hold no prompts, give data=prompts"):
        words.fit(words.make_on_policy(rows), rows)
    with pytest.raises(ConfigError, match=r"these data pose prompts: give data.num_prompts=0"):
        words.fit(SftTrace(words.make_training(data)), data)


def test_a_loss_that_is_not_finite_ends_the_run(words: Any) -> None:
    data = words.make_data()
    with pytest.raises((NonFiniteLoss, ValueError), match="not finite"):
        words.fit(words.make_on_policy(data, lr=1e30), data, max_steps=5)
