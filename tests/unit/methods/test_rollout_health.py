"""What is logged of a student's own words, what stops a run, and what it cost."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.errors import RolloutError
from research.methods.health import RolloutHealth

pytestmark = pytest.mark.filterwarnings("ignore")
HEALTH = {
    "rollout/length", "rollout/truncated", "rollout/correct", "rollout/reward", "rollout/all_right",
    "rollout/all_wrong", "rollout/equal_rewards", "rollout/unreadable_gold", "rollout/sampled_entropy",
    "rollout/entropy", "rollout/sampler_kl", "rollout/staleness",
}  # fmt: skip


def test_p64_every_log_has_truncation_entropy_and_length(words: Any) -> None:
    """Against the rollouts themselves: 32 samples of 8 problems, of which one has no gold answer that can be read."""
    data = words.make_data(words.Even(unreadable=[5]))
    method, watch = words.make_on_policy(data, num_samples=4), words.Watch()
    words.step_of(method, data, callbacks=[watch], log_every_n_steps=1)
    (told,), drawn = watch.logged, words.rollouts_of(method)
    assert {name for name in told if name.startswith("rollout/")} == HEALTH
    flat = [one for four in drawn.values() for one in four]
    right = {index: [words.is_right(one) and index != 5 for one in four] for index, four in drawn.items()}
    assert told["rollout/length"] == pytest.approx(sum(len(one.ids) for one in flat) / 32)
    assert 0 < told["rollout/truncated"] == pytest.approx(sum(one.stop == "length" for one in flat) / 32)
    assert 0 < told["rollout/correct"] == told["rollout/reward"] == pytest.approx(sum(map(sum, right.values())) / 32)
    assert told["rollout/all_right"] == pytest.approx(sum(all(four) for four in right.values()) / 8)
    assert told["rollout/all_wrong"] == pytest.approx(sum(not any(four) for four in right.values()) / 8)
    assert told["rollout/equal_rewards"] == pytest.approx(sum(len(set(four)) == 1 for four in right.values()) / 8)
    assert told["rollout/unreadable_gold"] == pytest.approx(4 / 32)
    network, entropies = words.make_network(data), []
    rows = words.rows_of(method, data)
    for prompt, _, completion, _ in rows:
        logprobs = words.logits_after(network, prompt, completion, words.V).log_softmax(-1)
        entropies.append(-(logprobs.exp() * logprobs).sum(-1))
    sampled = [value for *_, logprobs in rows for value in logprobs]
    assert told["rollout/sampled_entropy"] == pytest.approx(-sum(sampled) / len(sampled))
    assert told["rollout/entropy"] == pytest.approx(float(torch.cat(entropies).detach().mean()))


class NeverEnds(nn.Module):
    """A language model whose EOS has no probability to speak of."""

    def __init__(self, words: Any, data: Any) -> None:
        super().__init__()
        self.inner = words.make_network(data)
        self.model = self.inner.model
        eos = torch.tensor(data.codec.eos_ids)
        self.model.lm_head.register_forward_hook(lambda module, given, logits: logits.index_fill(-1, eos, -50.0))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)


def test_p64_a_student_that_never_stops_is_warned_of_and_stopped(words: Any, caplog: pytest.LogCaptureFixture) -> None:
    data = words.make_data()
    caplog.set_level(logging.WARNING, "research.methods.health")

    def run(**options: Any) -> None:
        method = words.make_on_policy(data, student=NeverEnds(words, data), lr=1e-4, patience=2, **options)
        words.fit(method, data, max_steps=5)

    run(max_truncated_share=1.0)
    assert [record.message[:47] for record in caplog.records] == ["more than half of the student's rollouts reache"] * 2
    with pytest.raises(RolloutError, match=r"100% of the student.* for 2 blocks in a row.*init_from=FOLDER"):
        run()


def test_p64_collapsed_entropy_is_warned_of(words: Any, caplog: pytest.LogCaptureFixture) -> None:
    data = words.make_data()
    student = words.make_network(data)
    with torch.no_grad():
        student.model.lm_head.weight.mul_(1e5)
    words.fit(words.make_on_policy(data, student=student, lr=0.0, patience=3), data, max_steps=4)
    (told,) = (record.message for record in caplog.records if "entropy" in record.message)
    assert "is 0 nats per token, 3 blocks in a row below 0.001: it has stopped choosing" in told


FIGURES = {"rollout/truncated": 0.0, "rollout/equal_rewards": 0.0, "rollout/sampled_entropy": 1.0}


def test_streaks_count_blocks_once_and_begin_anew(caplog: pytest.LogCaptureFixture) -> None:
    """Three bad blocks in a row warn, and six; a good one in between, or the same block again, does not count."""
    bad = {"rollout/truncated": 0.6, "rollout/equal_rewards": 1.0, "rollout/sampled_entropy": 1e-4}
    for name, value in bad.items():
        caplog.clear()
        watching = RolloutHealth(patience=3, compares_rewards=True)
        warned = []
        for block, is_bad in enumerate([1, 1, 0, 1, 1, 1, 1, 1, 1, 1]):
            for _ in range(2):  # a block that comes again after a resume
                watching.note(block, FIGURES | ({name: value} if is_bad else {}))
            warned.append(len(caplog.records))
            saved = watching.state_dict()
            watching = RolloutHealth(patience=3, compares_rewards=True)
            watching.load_state_dict(saved)
        assert warned == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2], name


def test_equal_rewards_are_no_fault_of_a_method_that_compares_none(caplog: pytest.LogCaptureFixture) -> None:
    RolloutHealth(patience=1).note(0, FIGURES | {"rollout/equal_rewards": 1.0})
    assert not caplog.records


# -- the ledger -------------------------------------------------------------------------------------------------------


def test_the_ledger_counts_what_was_drawn_read_and_trained(words: Any) -> None:
    """Two blocks of two steps each, two samples: rollouts are drawn and paid for once a block."""
    data, watch = words.make_data(steps_per_rollout=2, teacher_template=words.Bare(":;")), words.Watch()
    method = words.make_on_policy(data, lr=0.01, num_samples=2)
    words.fit(method, data, 2, max_steps=4, callbacks=[watch])
    prompt = sum(len(row.ids) for row in data.prompts())
    blocks = [watch.rollouts[1], watch.rollouts[7]]
    drawn = [sum(len(one.ids) for four in block.values() for one in four) for block in blocks]
    assert method.rollout_cost.tokens == sum(drawn) and method.rollout_cost.prompt_tokens == 2 * prompt
    assert method.tokens_seen == 2 * sum(drawn) + 4 * 2 * prompt
    assert method.teacher_tokens == 2 * sum(drawn) + 4 * 2 * (prompt + 8)
    assert method.rows_seen == method.teacher_rows == 4 * 16
    assert method.rollout_cost.flops > 0 and method.update_flops > 0 and method.teacher_flops > 0
    spent = method.spent()
    assert spent.tokens == method.tokens_seen + 2 * prompt + sum(drawn) + method.teacher_tokens
