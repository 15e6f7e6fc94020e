"""Policy gradient with an answer key against a float64 loop over single completions, and what it must refuse."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from research.errors import CheckpointError, ConfigError
from research.methods.policy_gradient import PolicyGradient
from research.methods.reward import VerifierReward
from research.methods.rollouts import Rollout
from research.records import Completion, PromptRow
from research.tasks.addition import Addition
from research.tasks.grading import Grader
from research.text.templates import Plain

pytestmark = pytest.mark.filterwarnings("ignore")
FORMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"normalise": False, "reduction": "fixed", "fixed_length": 5},
    "dapo": {"reduction": "token", "clip_high": 0.28, "filter_groups": True},
    "grpo_filtered": {"filter_groups": True},
    "dr_grpo_filtered": {"normalise": False, "reduction": "fixed", "fixed_length": 5, "filter_groups": True},
}


def by_hand(
    words: Any, data: Any, method: Any, network: nn.Module, *, normalise: bool = True, reduction: str = "sequence",
    fixed_length: int = 1, filter_groups: bool = False, clip_low: float = 0.2, clip_high: float = 0.2,
    unreadable: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    """The loss of one step, completion by completion."""
    prompts, terms = {row.problem.index: row.ids for row in data.prompts()}, []
    for index, drawn in words.rollouts_of(method).items():
        rewards = [float(words.is_right(one) and index not in unreadable) for one in drawn]
        mean = sum(rewards) / len(rewards)
        deviation = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5
        if filter_groups and deviation == 0:
            continue
        for reward, one in zip(rewards, drawn, strict=True):
            advantage = (reward - mean) / (deviation + 1e-6 if normalise else 1)
            places = torch.arange(len(one.ids)), torch.tensor(one.ids)
            logprobs = words.logits_after(network, prompts[index], one.ids, words.V).log_softmax(-1)[places]
            ratio = (logprobs - torch.tensor(one.logprobs, dtype=torch.float64)).exp()
            clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
            terms.append(-torch.minimum(ratio * advantage, clipped * advantage))
    return {
        "token": lambda: torch.cat(terms).mean(),
        "sequence": lambda: torch.stack([term.mean() for term in terms]).mean(),
        "fixed": lambda: torch.cat(terms).sum() / (len(terms) * fixed_length),
    }[reduction]()


@pytest.mark.parametrize("form", FORMS)
def test_p44_p45_p46_every_form_has_the_loop_s_gradient(words: Any, form: str) -> None:
    """In one micro-batch and in four; what is filtered out is in no denominator."""
    data, gradients = words.make_data(), []
    for parts in (1, 4):
        method = words.make_policy_gradient(data, **FORMS[form])
        gradients.append(words.step_of(method, data, parts))
        network = words.make_network(data)
        words.assert_same(
            gradients[-1], words.gradient_of(by_hand(words, data, method, network, **FORMS[form]), network)
        )
    groups = [{words.is_right(one) for one in drawn} for drawn in words.rollouts_of(method).values()]
    assert {frozenset(group) for group in groups} >= {frozenset({False}), frozenset({True, False})}


def test_the_forms_differ(words: Any) -> None:
    data, values = words.make_data(), {}
    for form, options in FORMS.items():
        method = words.make_policy_gradient(data, **options)
        values[form] = words.flat(words.step_of(method, data))
    for form, other in (
        ("grpo", "dr_grpo"),
        ("grpo", "dapo"),
        ("grpo", "grpo_filtered"),
        ("dr_grpo", "dr_grpo_filtered"),
    ):
        assert not torch.allclose(values[form], values[other], rtol=1e-3), (form, other)


@pytest.mark.parametrize("kl", [{}, {"kl_weight": 0.3, "kl_estimator": "k2"}, {"kl_weight": 0.3, "kl_estimator": "k3"}])
def test_the_second_step_corrects_for_the_first(words: Any, kl: dict[str, Any]) -> None:
    """Ratios and clipping against the policy that wrote, and the penalty against the student of the run's beginning."""
    data, watch = words.make_data(steps_per_rollout=2), words.Watch()
    method = words.make_policy_gradient(data, lr=0.3, **kl)
    words.fit(method, data, 2, max_steps=2, callbacks=[watch], log_every_n_steps=1)
    assert 0 < watch.logged[-1]["rollout/clipped"] < 1 and watch.logged[1]["rollout/clipped"] == 0
    network, start = words.make_network(data), words.make_network(data)
    prompts = {row.problem.index: row.ids for row in data.prompts()}
    for _ in range(2):
        network.zero_grad()
        loss, penalties = by_hand(words, data, method, network), []
        for index, drawn in words.rollouts_of(method).items():
            for one in drawn:
                places = torch.arange(len(one.ids)), torch.tensor(one.ids)
                q, p = (
                    words.logits_after(each, prompts[index], one.ids, words.V).log_softmax(-1)[places]
                    for each in (network, start)
                )
                p = p.detach()
                penalty = (q - p) ** 2 / 2 if kl.get("kl_estimator") == "k2" else (p - q).exp() - 1 - (p - q)
                penalties.append(penalty.mean())
        loss = loss + kl.get("kl_weight", 0.0) * torch.stack(penalties).mean()
        gradient = words.gradient_of(loss, network)
        with torch.no_grad():
            for parameter, slope in zip(network.parameters(), gradient, strict=True):
                parameter -= 0.3 * slope
    words.assert_same(list(method.student.parameters()), list(network.parameters()), rtol=1e-6)


def test_p66_a_gold_answer_that_cannot_be_read_rewards_nothing(words: Any) -> None:
    """Samples that its verifier would call right for another problem: no reward, no gradient, and they are counted."""
    unreadable = (2, 5)
    data, watch = words.make_data(words.Even(unreadable)), words.Watch()
    method = words.make_policy_gradient(data)
    gradient = words.step_of(method, data, callbacks=[watch], log_every_n_steps=1)
    drawn = words.rollouts_of(method)
    assert any(words.is_right(one) for index in unreadable for one in drawn[index])
    network = words.make_network(data)
    loss = by_hand(words, data, method, network, unreadable=unreadable)
    words.assert_same(gradient, words.gradient_of(loss, network))
    assert watch.logged[0]["rollout/unreadable_gold"] == 2 / 8


@pytest.mark.parametrize("filter_groups", [False, True])
def test_equal_rewards_teach_nothing_and_are_warned_of(
    words: Any, filter_groups: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data, watch = words.make_data(words.Even(range(8))), words.Watch()
    method = words.make_policy_gradient(data, patience=2, filter_groups=filter_groups)
    before = words.flat(list(method.student.parameters()))
    words.fit(method, data, 2, max_steps=5, callbacks=[watch], log_every_n_steps=1)
    assert torch.equal(words.flat(list(method.student.parameters())), before) and not any(watch.losses)
    assert watch.logged[-1]["rollout/equal_rewards"] == watch.logged[-1]["rollout/all_wrong"] == 1
    told = [record.message for record in caplog.records if "all rewards of every problem were equal" in record.message]
    assert len(told) == 2 and "equal, 2 blocks in a row" in told[0] and "equal, 4 blocks in a row" in told[1]


def test_it_learns_what_is_rewarded(words: Any) -> None:
    """The share of right answers climbs by more than a quarter within 40 small steps."""
    data, watch = words.make_data(), words.Watch()
    training = words.make_training(data, words.make_network(data).float(), optimizer=partial(torch.optim.Adam, lr=0.01))
    method = PolicyGradient(training, num_samples=8, max_new_tokens=8)
    words.fit(method, data, max_steps=40, callbacks=[watch], log_every_n_steps=1)
    correct = [told["rollout/correct"] for told in watch.logged]
    assert sum(correct[-5:]) / 5 > sum(correct[:5]) / 5 + 0.25


def test_the_start_is_in_no_checkpoint_and_names_itself(words: Any, tmp_path: Path) -> None:
    """A penalty for leaving the start: the file holds the student alone, and another start is no place to go on."""
    data = words.make_data()
    method = words.make_policy_gradient(data, kl_weight=0.1)
    trainer = words.fit(method, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    names = {f"student.{name}" for name in method.student.state_dict()}
    assert set(checkpoint["state_dict"]) == names == set(method.state_dict())
    assert {id(p) for p in method.parameters()} == {id(p) for p in method.student.parameters()}
    other = words.make_policy_gradient(data, words.make_network(data, seed=3), kl_weight=0.1)
    with pytest.raises(CheckpointError, match="this run begins with others than the checkpoint's"):
        words.make_trainer(max_steps=2).fit(other, datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    same, trainer = words.make_policy_gradient(data, kl_weight=0.1), words.make_trainer(max_steps=2)
    trainer.fit(same, datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert trainer.global_step == 2


def test_the_start_s_forward_pass_is_charged(words: Any) -> None:
    """One forward pass of the start over what the student wrote, counted by torch; the drawing costs the same."""
    spent = {}
    for weight in (0.0, 0.1):
        data = words.make_data()
        method = words.make_policy_gradient(data, kl_weight=weight)
        words.fit(method, data)
        spent[weight] = method.update_flops
        inputs = method.trained(None).network_inputs()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            method.student(*inputs)
    assert spent[0.1] - spent[0.0] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert method.spent().flops == spent[0.1] + method.rollout_cost.flops


def test_stored_traces_are_refused_where_none_is_taken(words: Any) -> None:
    data = words.make_data(num_stored=8)
    with pytest.raises(ConfigError, match=r"data.num_stored is 8, and method=policy_gradient trains on"):
        words.fit(words.make_policy_gradient(data), data)
    assert not words.make_on_policy(data).takes_stored_traces, "a run of fraction 1 is not charged for them"
    assert words.make_on_policy(data, on_policy_fraction=0.5).takes_stored_traces


# -- the reward -------------------------------------------------------------------------------------------------------

TASK = Addition(min_digits=2, max_digits=2)
PROBLEM = TASK.problems("train", 1)[0]
FIRST, *OTHERS = PROBLEM.chain.split(";")
WRONG = "0" if PROBLEM.answer[0] != "0" else "1"


def reward(text: str, step_reward: float, stop: str = "eos", gold: str | None = None) -> tuple[float, bool]:
    problem = PROBLEM if gold is None else type(PROBLEM)(**{**vars(PROBLEM), "answer": gold})
    rollout = Rollout(PromptRow(problem, (1,), (1,)), Completion((1,), text, stop))
    (graded,) = VerifierReward(Grader(TASK, Plain(), "chain_then_answer"), step_reward)([rollout])
    return graded.reward, graded.readable


def test_partial_rewards_by_hand() -> None:
    """1 for the answer; steps pay their valid share of step_reward, and nothing where a needed one is missing."""
    right, chain = f"{PROBLEM.chain}#{PROBLEM.answer}", PROBLEM.chain
    assert reward(right, 0.0) == (1, True) and reward(right, 0.5) == (1.5, True)
    assert reward(f"{chain}#{WRONG}", 0.5) == (0.5, True), "every step follows, the answer is another"
    assert reward(f"#{PROBLEM.answer}", 0.5) == (1, True), "an answer alone has no steps"
    assert reward(f"{FIRST}#{WRONG}", 0.5) == (0, True), "a chain is not paid for being short"
    wrong_step = ";".join([FIRST[:-1] + ("0" if FIRST[-1] != "0" else "1"), *OTHERS])
    given, _ = reward(f"{wrong_step}#{WRONG}", 0.6)
    assert 0 <= given < 0.6
    assert reward(right, 0.0, stop="length") == (0, True), "cut off is not right, whatever was written"


@pytest.mark.parametrize("gold", ["", "??"])
def test_p66_no_reward_without_a_readable_gold_answer(gold: str) -> None:
    for text in (f"{PROBLEM.chain}#{PROBLEM.answer}", f"{PROBLEM.chain}#{gold}", "#", ""):
        assert reward(text, 0.5, gold=gold) == (0, False)


# -- bad input --------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_samples": 1}, "method.num_samples is 1; rewards are compared within"),
    ({"sampling_temperature": 0.0}, "samples of the policy itself"),
    ({"top_p": 0.9}, "samples of the policy itself"),
    ({"kl_estimator": "k1"}, "method.kl_estimator is 'k1'"),
    ({"kl_weight": -1.0}, "method.kl_weight is -1.0"),
    ({"clip_low": 0.0}, "clip_low=0.0"),
    ({"reduction": "mean"}, "method.reduction is 'mean'"),
    ({"reduction": "fixed"}, "method.fixed_length is None"),
    ({"step_reward": 0.5}, "method.step_reward is 0.5, and even cannot check steps"),
    ({"step_reward": -0.5}, "method.step_reward is -0.5"),
    ({"max_truncated_share": 2.0}, "method.max_truncated_share is 2.0"),
]


@pytest.mark.parametrize(("options", "told"), BAD, ids=[told for _, told in BAD])
def test_bad_options_are_refused_before_the_first_step(words: Any, options: dict[str, Any], told: str) -> None:
    data = words.make_data()
    with pytest.raises(ValueError, match=told):
        words.step_of(words.make_policy_gradient(data, **options), data)


def test_it_asks_no_teacher_and_needs_prompts(words: Any) -> None:
    data, rows = words.make_data(), words.make_data(num_prompts=0)
    with pytest.raises(ConfigError, match="asks no teacher; give teacher=none"):
        PolicyGradient(words.make_training(data), words.make_teacher(data))
    with pytest.raises(ConfigError, match="these data hold no prompts"):
        words.fit(words.make_policy_gradient(rows), rows)
