"""Teacher-forced loss against a loop over documents, against the training loss, and blind to what is masked."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from research.evaluation.token_loss import TOKEN_METRIC_NAMES, evaluate_tokens, predicting
from research.methods.base import Training
from research.methods.sft_trace import SftTrace
from research.text.document import Document, collate

PAD, VOCABULARY = 0, 7
DOCUMENTS = [
    Document((3, 1, 4, 1, 5), 2, 10),
    Document((2, 6, 5), 1, 11),
    Document((1, 1, 2, 3, 4, 6, 6, 5), 5, 12),
    Document((4, 2), 1, 13),
]


class Bigrams(nn.Module):
    """Logits from the token and its place alone, so that a document's numbers can be worked out without its row."""

    def __init__(self, dropout=0.5):
        super().__init__()
        torch.manual_seed(3)
        self.table, self.place = nn.Embedding(VOCABULARY, VOCABULARY), nn.Embedding(16, VOCABULARY)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids_BT, position_BT, segment_BT):
        return self.dropout(self.table(ids_BT) + self.place(position_BT))


def batches(*sizes, weight=0.0, packed_to=None):
    rows = iter(DOCUMENTS)
    for size in sizes:
        documents = [next(rows) for _ in range(size)]
        yield collate(documents, prompt_loss_weight=weight, pad_id=PAD, packed_to=packed_to)


def by_loop(network):
    """(nll, right) of each completion token and nll of each prompt token after the first, document by document."""
    completion, prompt = [], []
    for document in DOCUMENTS:
        for place in range(len(document.ids) - 1):
            row = (network.table.weight[document.ids[place]] + network.place.weight[place]).double().tolist()
            token = document.ids[place + 1]
            nll = math.log(sum(math.exp(logit) for logit in row)) - row[token]
            right = max(row) == row[token]
            (completion if place + 1 >= document.prompt_length else prompt).append((document.index, nll, right))
    return completion, prompt


@pytest.mark.parametrize("packed_to", [None, 8, 16])
def test_every_number_against_a_loop(packed_to) -> None:
    network = Bigrams()
    result = evaluate_tokens(network, batches(3, 1, weight=0.25, packed_to=packed_to), split="val")
    completion, prompt = by_loop(network)
    nll = sum(row[1] for row in completion) / len(completion)
    prompt_sum = sum(row[1] for row in prompt)
    assert tuple(result.metrics) == tuple(f"val/{name}" for name in TOKEN_METRIC_NAMES)
    assert result.metrics["val/nll"] == pytest.approx(nll, abs=1e-6)
    assert result.metrics["val/perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert result.metrics["val/token_accuracy"] == sum(row[2] for row in completion) / len(completion)
    assert result.metrics["val/completion_tokens"] == len(completion) == 9
    assert result.metrics["val/prompt_nll"] == pytest.approx(prompt_sum / len(prompt), abs=1e-6)
    assert result.metrics["val/prompt_tokens"] == len(prompt) == 5
    loss = (nll * len(completion) + 0.25 * prompt_sum) / (len(completion) + 0.25 * len(prompt))
    assert result.metrics["val/loss"] == pytest.approx(loss, abs=1e-6)
    for index, total, tokens, right in zip(*result.documents.values(), strict=True):
        rows = [row for row in completion if row[0] == index]
        assert (total, tokens, right) == (pytest.approx(sum(r[1] for r in rows)), len(rows), sum(r[2] for r in rows))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_p49_loss_is_the_training_loss_of_the_same_batch(weight) -> None:
    network = Bigrams()
    (batch,) = batches(4, weight=weight)
    result = evaluate_tokens(network, [batch], split="val")
    method = SftTrace(Training(network.eval(), optimizer=lambda parameters: None, scheduler=None, architecture={}))
    (component,) = method.components(batch)
    assert result.metrics["val/loss"] == pytest.approx(
        float(component.loss.total.detach()) / component.step_count, abs=1e-6
    )
    if weight == 0:
        assert result.metrics["val/loss"] == pytest.approx(result.metrics["val/nll"], abs=1e-12)


class Masked(nn.Module):
    """The same logits, but anything at places where no token is predicted."""

    def __init__(self, network, batch, value):
        super().__init__()
        self.network, self.value, self.masked_BT = network, value, ~predicting(batch)

    def forward(self, *inputs):
        return self.network(*inputs).masked_fill(self.masked_BT.unsqueeze(-1), self.value)


@pytest.mark.parametrize("value", [math.nan, 1e9, math.inf])
@pytest.mark.parametrize("packed_to", [None, 16])
def test_p32_masked_places_add_nothing(value, packed_to) -> None:
    network = Bigrams()
    (batch,) = batches(4, packed_to=packed_to)
    clean = evaluate_tokens(network, [batch], split="val")
    assert evaluate_tokens(Masked(network, batch, value), [batch], split="val").metrics == clean.metrics


@pytest.mark.parametrize("pads", [1, 7])
def test_p32_padding_changes_nothing(pads) -> None:
    network = Bigrams()
    (batch,) = batches(4)
    names = ("ids_BT", "label_BT", "weight_BT", "completion_BT", "position_BT", "segment_BT")
    wide = {name: nn.functional.pad(getattr(batch, name), (0, pads)) for name in names}
    clean = evaluate_tokens(network, [batch], split="val")
    assert evaluate_tokens(network, [replace(batch, **wide)], split="val").metrics == clean.metrics


def test_batches_are_summed_and_not_averaged() -> None:
    network = Bigrams()
    whole = evaluate_tokens(network, batches(4), split="val").metrics
    assert evaluate_tokens(network, batches(3, 1), split="val").metrics == pytest.approx(whole, rel=1e-12)


def test_modes_come_back_and_nothing_learns() -> None:
    network = Bigrams()
    network.dropout.eval()
    evaluate_tokens(network, batches(4), split="val")
    assert network.training and network.table.training and not network.dropout.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_excluded_tokens_are_no_fault_and_broken_logits_are() -> None:
    class Shifted(Bigrams):
        extra = torch.tensor([0.0, 0, 0, 0, 0, 0, -math.inf])

        def forward(self, *inputs):
            return super().forward(*inputs) + self.extra

    network = Shifted()
    short = [collate(DOCUMENTS[:1], prompt_loss_weight=0.0, pad_id=PAD)]  # no 6 in it
    assert math.isfinite(evaluate_tokens(network, short, split="val").metrics["val/nll"])
    assert evaluate_tokens(network, batches(4), split="val").metrics["val/perplexity"] == math.inf
    prompt = [collate([Document((3, 6, 5), 2, 0)], prompt_loss_weight=0.0, pad_id=PAD)]  # 6 is not trained on
    found = evaluate_tokens(network, prompt, split="val").metrics
    assert found["val/prompt_nll"] == math.inf and found["val/loss"] == found["val/nll"] < math.inf
    network.extra = network.extra.nan_to_num(neginf=math.nan)
    with pytest.raises(ValueError, match=r"NaN or \+inf at 4 of 4 graded positions") as raised:
        evaluate_tokens(network, short, split="val")
    assert "documents [10]" in str(raised.value)


def test_what_cannot_be_evaluated_is_refused_or_omitted() -> None:
    network = Bigrams()
    with pytest.raises(ValueError, match="no batch"):
        evaluate_tokens(network, [], split="val")
    prompts = [collate([Document((1, 2, 3), 3, 0)], prompt_loss_weight=1.0, pad_id=PAD)]
    with pytest.raises(ValueError, match="no completion token"):
        evaluate_tokens(network, prompts, split="val")
    with pytest.raises(ValueError, match="without '/'"):
        evaluate_tokens(network, batches(4), split="a/b")
    (batch,) = batches(4)
    with pytest.raises(ValueError, match=r"index_D has 3"):
        evaluate_tokens(network, [replace(batch, index_D=batch.index_D[:3])], split="val")
    bare = [collate([Document((1, 2), 1, 0)], prompt_loss_weight=0.0, pad_id=PAD)]
    assert set(evaluate_tokens(network, bare, split="val").omitted) == {"val/prompt_nll"}
