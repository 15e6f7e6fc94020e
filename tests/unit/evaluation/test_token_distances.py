"""Per-token distances of one completion: two-token vocabularies by hand, and a loop over one document."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.data.traces import TraceData
from research.evaluation.token_distances import token_distances
from research.models.build import build_network
from research.records import Completion
from research.tasks.arithmetic import ChainedSums
from research.text.templates import Plain

SIZES: dict[str, Any] = {
    "_target_": "research.models.language.LanguageModel", "architecture": "llama", "hidden_size": 16,
    "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "max_positions": 64, "initializer_range": 0.4,
}  # fmt: skip


class Says(nn.Module):
    """The same two-token distribution at every place: tokens ``first`` and ``second`` share all probability."""

    def __init__(self, width: int, first: int, second: int, prob_first: float) -> None:
        super().__init__()
        logits_V = torch.full((width,), -1e4)
        logits_V[first], logits_V[second] = math.log(prob_first), math.log(1 - prob_first)
        self.logits_V = nn.Parameter(logits_V)

    def forward(self, ids_BT: Tensor, *_: Any) -> Tensor:
        return self.logits_V.expand(*ids_BT.shape, -1)


@pytest.fixture(scope="module")
def data() -> TraceData:
    task = ChainedSums(num_terms=3, highest=9)
    return TraceData(task=task, template=Plain(), num_train=20, num_val=2, num_test=3, max_tokens=40)


def network(data: TraceData, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_network(SIZES, **data.facts())


def test_two_tokens_by_hand(data: TraceData) -> None:
    """Student 1/2, 1/2, teacher 3/4, 1/4: KLs of 0.75 ln 1.5 + 0.25 ln 0.5 and 0.5 ln(2/3) + 0.5 ln 2."""
    codec, problem = data.codec, data.problems("test")[0]
    first, second = codec.encoder.middle("7;")
    student, teacher = Says(codec.vocab_size, first, second, 0.5), Says(codec.vocab_size, first, second, 0.75)
    found = token_distances(student, teacher, codec, codec, problem, Completion((second, first), ";7", "length"))
    assert found.pieces == (";", "7") and found.preferred == ("7", "7")
    assert found.forward_kl == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)] * 2, rel=1e-5)
    assert found.reverse_kl == pytest.approx([0.5 * math.log(2 / 3) + 0.5 * math.log(2)] * 2, rel=1e-5)
    assert found.student_nll == pytest.approx([math.log(2)] * 2)
    assert found.teacher_nll == pytest.approx([math.log(4), math.log(4 / 3)])


def test_each_place_is_predicted_from_the_prompt_and_the_tokens_before_it(data: TraceData) -> None:
    codec, problem = data.codec, data.problems("test")[1]
    student, teacher = network(data, 0), network(data, 1)
    ids = (*codec.encoder.middle("3;1:1"), codec.eos_ids[0])
    found = token_distances(student, teacher, codec, codec, problem, Completion(ids, codec.decode(ids), "eos"))
    prompt = codec.prompt_ids(problem.text)
    for place, token in enumerate(ids):
        read = torch.tensor([[*prompt, *ids[:place]]])
        with torch.no_grad():
            q, p = (one.model(input_ids=read).logits[0, -1].double().log_softmax(-1) for one in (student, teacher))
        assert found.forward_kl[place] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
        assert found.reverse_kl[place] == pytest.approx(float((q.exp() * (q - p)).sum()), rel=1e-4)
        assert found.student_nll[place] == pytest.approx(-float(q[token]), rel=1e-4)
        assert found.teacher_nll[place] == pytest.approx(-float(p[token]), rel=1e-4)
        assert found.preferred[place] == codec.pieces([int(p.argmax())])[0]


def test_a_student_that_is_its_teacher_is_nowhere_away_from_it(data: TraceData) -> None:
    problem = data.problems("test")[2]
    ids = tuple(data.codec.encoder.middle("1;2"))
    same = network(data, 3)
    found = token_distances(same, same, data.codec, data.codec, problem, Completion(ids, "1;2", "length"))
    assert max(map(abs, found.forward_kl + found.reverse_kl)) < 1e-6 and found.student_nll == found.teacher_nll


def test_a_completion_without_tokens_is_refused(data: TraceData) -> None:
    problem, model = data.problems("test")[0], network(data, 0)
    with pytest.raises(ValueError, match=f"problem {problem.index} has no token"):
        token_distances(model, model, data.codec, data.codec, problem, Completion((), "", "length"))
