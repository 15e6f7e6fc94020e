"""Alignment, weights, padding and packing, against hand-made rows, a per-token loop, and a real small network."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from research.records import TokenBatch
from research.text.document import Document, collate, document_counts
from research.text.refusals import TooLong

VOCABULARY = 32
PAD = 0


@pytest.fixture(scope="module")
def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).eval()


def logits_of(network: LlamaForCausalLM, batch: TokenBatch) -> Tensor:
    """The network's logits, every document kept to itself by a mask over pairs of places."""
    segment_BT = batch.segment_BT
    same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
    width = segment_BT.shape[1]
    causal_TT = torch.ones(width, width, dtype=torch.bool).tril()
    with torch.no_grad():
        out = network(batch.ids_BT, attention_mask=(same_BTT & causal_TT)[:, None], position_ids=batch.position_BT)
    return out.logits


def losses_of(logits_BTV: Tensor, batch: TokenBatch) -> Tensor:
    return F.cross_entropy(logits_BTV.transpose(1, 2), batch.label_BT, reduction="none") * batch.weight_BT


def documents(*shapes: tuple[int, int], seed: int = 0) -> list[Document]:
    """Documents of (prompt, completion) tokens, with ids from 3."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, (prompt, completion) in enumerate(shapes):
        ids = torch.randint(3, VOCABULARY, (prompt + completion,), generator=generator)
        made.append(Document(tuple(ids.tolist()), prompt, 100 + index))
    return made


RAGGED = ((2, 5), (9, 3), (4, 4), (1, 1), (6, 7), (3, 2))


def by_place(batch: TokenBatch, values_BT: Tensor) -> dict[tuple[int, int], Tensor]:
    """Values keyed by (document's index, place in it), whatever rows the documents stand in."""
    number, found = 0, {}
    for row in range(batch.ids_BT.shape[0]):
        for segment in range(1, int(batch.segment_BT[row].max()) + 1):
            here = batch.segment_BT[row] == segment
            for place, value in zip(batch.position_BT[row][here].tolist(), values_BT[row][here], strict=True):
                found[int(batch.index_D[number]), place] = value
            number += 1
    assert number == len(batch)
    return found


# -- values by hand ---------------------------------------------------------------------------------------------------


def test_two_rows_by_hand() -> None:
    batch = collate([Document((5, 6, 7, 8, 9), 3, 40), Document((5, 6, 9), 1, 41)], prompt_loss_weight=0.25, pad_id=PAD)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9], [5, 6, 9, 0, 0]]
    assert batch.label_BT.tolist() == [[6, 7, 8, 9, 0], [6, 9, 0, 0, 0]]
    assert batch.weight_BT.tolist() == [[0.25, 0.25, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert batch.completion_BT.tolist() == [[False, False, True, True, False], [True, True, False, False, False]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert batch.segment_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.index_D.tolist() == [40, 41]
    assert (batch.step_weight, batch.step_completion_tokens, batch.step_rows) == (4.5, 4, 2)
    assert [batch.ids_BT.dtype, batch.label_BT.dtype, batch.position_BT.dtype, batch.segment_BT.dtype] == [
        torch.int64
    ] * 4
    assert (batch.weight_BT.dtype, batch.completion_BT.dtype) == (torch.float32, torch.bool)


def test_packed_rows_by_hand() -> None:
    """Longest first into the first row with room: 4 and 3 fill a row of 7, then 3 and 2."""
    made = [Document((1, 2), 1, 0), Document((3, 4, 5), 1, 1), Document((6, 7, 8, 9), 2, 2), Document((1, 1, 2), 2, 3)]
    batch = collate(made, prompt_loss_weight=0.0, pad_id=PAD, packed_to=7)
    assert batch.ids_BT.tolist() == [[6, 7, 8, 9, 3, 4, 5], [1, 1, 2, 1, 2, 0, 0]]
    assert batch.label_BT.tolist() == [[7, 8, 9, 0, 4, 5, 0], [1, 2, 0, 2, 0, 0, 0]]
    assert batch.weight_BT.tolist() == [[0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 1, 0, 0, 0]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 1, 0, 0]]
    assert batch.segment_BT.tolist() == [[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 0, 0]]
    assert batch.index_D.tolist() == [2, 1, 3, 0]


def test_the_step_is_told_or_taken_from_the_documents() -> None:
    made = documents(*RAGGED)
    batch = collate(made, prompt_loss_weight=0.5, pad_id=PAD)
    assert (batch.step_weight, batch.step_completion_tokens, batch.step_rows) == document_counts(made, 0.5)
    told = collate(made, prompt_loss_weight=0.5, pad_id=PAD, step_weight=90.5, step_completion_tokens=80, step_rows=70)
    assert (told.step_weight, told.step_completion_tokens, told.step_rows) == (90.5, 80, 70)


SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(SHAPES, st.sampled_from([0.0, 0.25, 1.0]), st.none() | st.integers(18, 40))
def test_every_batch_agrees_with_a_loop_over_its_documents(
    shapes: list[tuple[int, int]], weight: float, packed_to: int | None
) -> None:
    made = documents(*shapes)
    batch = collate(made, prompt_loss_weight=weight, pad_id=PAD, packed_to=packed_to)
    assert sorted(batch.index_D.tolist()) == [document.index for document in made]
    if packed_to is not None:
        assert batch.ids_BT.shape[1] <= packed_to
    columns = {name: by_place(batch, getattr(batch, f"{name}_BT")) for name in ("ids", "label", "weight", "completion")}
    for document in made:
        for place, token in enumerate(document.ids):
            key, last = (document.index, place), place == len(document.ids) - 1
            in_completion = not last and place + 1 >= document.prompt_length
            assert columns["ids"][key] == token
            assert columns["label"][key] == (0 if last else document.ids[place + 1])
            assert columns["completion"][key] == in_completion
            assert columns["weight"][key] == (0 if last else 1 if in_completion else weight)
    padding = batch.segment_BT == 0
    assert (batch.ids_BT[padding] == PAD).all() and not batch.weight_BT[padding].any()
    assert not batch.completion_BT[padding].any() and not batch.label_BT[padding].any()
    assert int((~padding).sum()) == sum(map(len, made))
    assert batch.step_weight == pytest.approx(float(batch.weight_BT.sum()), rel=1e-6)
    assert batch.step_completion_tokens == int(batch.completion_BT.sum())


# -- what the field got wrong -----------------------------------------------------------------------------------------


def test_p31_logits_at_a_place_are_graded_on_the_next_token_alone(network: LlamaForCausalLM) -> None:
    batch = collate(documents((3, 4), (2, 2)), prompt_loss_weight=0.5, pad_id=PAD)
    logits_BTV = logits_of(network, batch)
    before = losses_of(logits_BTV, batch)
    for row, place in ((0, 0), (0, 2), (0, 5), (1, 1)):
        changed = logits_BTV.clone()
        changed[row, place, int(batch.ids_BT[row, place + 1])] += 3.0  # towards the next token
        after = losses_of(changed, batch)
        assert after[row, place] < before[row, place]
        after[row, place] = before[row, place]
        assert torch.equal(after, before)


def test_p31_the_loss_is_that_of_a_network_that_shifts_by_itself(network: LlamaForCausalLM) -> None:
    """transformers' own loss takes unshifted labels, with -100 on the prompt."""
    for document in documents(*RAGGED):
        batch = collate([document], prompt_loss_weight=0.0, pad_id=PAD)
        labels = torch.tensor([document.ids])
        labels[0, : document.prompt_length] = -100
        reference = network(torch.tensor([document.ids]), labels=labels).loss
        ours = losses_of(logits_of(network, batch), batch).sum() / batch.step_weight
        assert float(ours) == pytest.approx(float(reference.detach()), rel=1e-6)


def test_p32_prompt_and_padding_have_no_gradient(network: LlamaForCausalLM) -> None:
    made = documents(*RAGGED)
    batch = collate(made, prompt_loss_weight=0.0, pad_id=PAD)
    logits_BTV = logits_of(network, batch).requires_grad_()
    losses_of(logits_BTV, batch).sum().backward()
    touched_BT = logits_BTV.grad.abs().sum(-1) > 0
    assert torch.equal(touched_BT, batch.completion_BT)
    for row, document in enumerate(made):
        expected = range(document.prompt_length - 1, len(document) - 1)
        assert touched_BT[row].nonzero().flatten().tolist() == list(expected)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_p32_padding_changes_neither_loss_nor_gradient(network: LlamaForCausalLM, weight: float) -> None:
    short = documents((3, 4))[0]
    alone = collate([short], prompt_loss_weight=weight, pad_id=PAD)
    beside = collate([short, *documents((9, 8))], prompt_loss_weight=weight, pad_id=PAD)
    assert beside.ids_BT.shape[1] - alone.ids_BT.shape[1] == 10
    grads = []
    for batch in (alone, beside):
        network.zero_grad()
        mask = (batch.segment_BT[:, None, None, :] > 0) & torch.ones(batch.ids_BT.shape[1:] * 2, dtype=bool).tril()
        logits = network(batch.ids_BT, attention_mask=mask, position_ids=batch.position_BT).logits
        loss = losses_of(logits, batch)[0].sum()
        loss.backward()
        grads.append((float(loss.detach()), network.lm_head.weight.grad.clone()))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-6)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-5, atol=1e-6)
    network.zero_grad()


def test_p34_eos_is_trained_where_pad_is_eos() -> None:
    eos = 2
    made = [Document((5, 6, 7, eos), 2, 0), Document((5, eos), 1, 1)]
    batch = collate(made, prompt_loss_weight=0.0, pad_id=eos)
    assert batch.ids_BT.tolist() == [[5, 6, 7, eos], [5, eos, eos, eos]]
    predicts_eos = batch.label_BT == eos
    assert (batch.weight_BT * predicts_eos).sum(1).tolist() == [1, 1], "the first EOS of each row, and no padding"
    assert batch.segment_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_p35_prompts_of_2_and_9_tokens_keep_their_whole_completions() -> None:
    made = documents((2, 5), (9, 3))
    batch = collate(made, prompt_loss_weight=0.0, pad_id=PAD)
    for row, document in enumerate(made):
        assert batch.label_BT[row][batch.completion_BT[row]].tolist() == list(document.ids[document.prompt_length :])


def test_p36_a_batch_that_trains_on_nothing_is_finite(network: LlamaForCausalLM) -> None:
    batch = collate(documents((4, 0), (2, 0)), prompt_loss_weight=0.0, pad_id=PAD)
    assert (batch.step_weight, batch.step_completion_tokens, batch.step_rows) == (0, 0, 2)
    logits_BTV = logits_of(network, batch).requires_grad_()
    loss = losses_of(logits_BTV, batch).sum()
    loss.backward()
    assert float(loss.detach()) == 0 and not logits_BTV.grad.any()


def test_p43_packed_logits_are_the_unpacked_ones(network: LlamaForCausalLM) -> None:
    made = documents(*RAGGED)
    packed = collate(made, prompt_loss_weight=0.0, pad_id=PAD, packed_to=20)
    assert packed.ids_BT.shape[0] < len(made) and int(packed.segment_BT.max()) > 1
    found = by_place(packed, logits_of(network, packed))
    for document in made:
        single = collate([document], prompt_loss_weight=0.0, pad_id=PAD)
        expected = network(torch.tensor([document.ids])).logits[0]
        for place, logits_V in enumerate(expected):
            torch.testing.assert_close(found[document.index, place], logits_V, rtol=0, atol=1e-5)
        assert int(single.position_BT.max()) == len(document) - 1


def test_p43_a_document_does_not_see_the_one_before_it(network: LlamaForCausalLM) -> None:
    first, second = documents((6, 4), (3, 3))
    edited = Document(tuple(id_ % (VOCABULARY - 4) + 4 for id_ in first.ids), first.prompt_length, first.index)
    one, two = (
        collate([document, second], prompt_loss_weight=0.0, pad_id=PAD, packed_to=16) for document in (first, edited)
    )
    assert one.ids_BT.shape == two.ids_BT.shape == (1, 16) and not torch.equal(one.ids_BT, two.ids_BT)
    here = one.segment_BT == 2
    assert torch.equal(logits_of(network, one)[here], logits_of(network, two)[here])
    assert not torch.equal(logits_of(network, one)[~here], logits_of(network, two)[~here])


@pytest.mark.parametrize("packed_to", [None, 16, 40])
def test_c15_packing_and_padding_give_one_loss(network: LlamaForCausalLM, packed_to: int | None) -> None:
    made = documents(*RAGGED)
    expected = sum(
        float(losses_of(logits_of(network, batch), batch).sum())
        for batch in (collate([document], prompt_loss_weight=0.2, pad_id=PAD) for document in made)
    )
    batch = collate(made, prompt_loss_weight=0.2, pad_id=PAD, packed_to=packed_to)
    assert float(losses_of(logits_of(network, batch), batch).sum()) == pytest.approx(expected, rel=1e-5)
    assert batch.step_weight == pytest.approx(document_counts(made, 0.2)[0])


def test_c15_changing_what_the_prompt_says_next_leaves_the_loss(network: LlamaForCausalLM) -> None:
    batch = collate(documents((5, 3)), prompt_loss_weight=0.0, pad_id=PAD)
    logits_BTV = logits_of(network, batch)
    before = losses_of(logits_BTV, batch).sum()
    batch.label_BT[0, :4] = 7
    assert torch.equal(losses_of(logits_BTV, batch).sum(), before)


def test_c17_the_loss_of_a_fresh_network_is_the_log_of_its_vocabulary() -> None:
    """Whoever wrote the text: three sources of the same ids give the same bits."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval()
    ids = torch.randint(0, 256, (8, 20)).tolist()
    means = []
    for start in (0, 1000, 2000):
        made = [Document(tuple(row), 4, start + number) for number, row in enumerate(ids)]
        batch = collate(made, prompt_loss_weight=0.0, pad_id=PAD)
        means.append(float(losses_of(logits_of(network, batch), batch).sum()) / batch.step_weight)
    assert means[0] == means[1] == means[2]
    assert abs(means[0] - math.log(256)) < 0.1


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_collated_says_why() -> None:
    with pytest.raises(ValueError, match="no documents to collate"):
        collate([], prompt_loss_weight=0.0, pad_id=PAD)
    with pytest.raises(ValueError, match=r"prompt_loss_weight=1\.5: give a number from 0"):
        collate(documents((2, 2)), prompt_loss_weight=1.5, pad_id=PAD)
    with pytest.raises(ValueError, match="prompt_loss_weight=nan"):
        collate(documents((2, 2)), prompt_loss_weight=math.nan, pad_id=PAD)
    with pytest.raises(TooLong, match="document 100 has 9 tokens and rows are packed to 8"):
        collate(documents((5, 4)), prompt_loss_weight=0.0, pad_id=PAD, packed_to=8)
    with pytest.raises(ValueError, match="document 3: prompt_length=0 of 2 tokens"):
        Document((1, 2), 0, 3)
    with pytest.raises(ValueError, match="document 3: prompt_length=3 of 2 tokens"):
        Document((1, 2), 3, 3)
