"""Traces to ids and back, against hand-made ids and an independent encoder."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from research.errors import ConfigError
from research.records import Trace
from research.text.codec import Codec
from research.text.document import collate
from research.text.formats import MODES, TRACE_FORMATS
from research.text.refusals import (
    ControlToken,
    EmptyChain,
    MissingAnswer,
    Refused,
    TooLong,
    UnknownCharacter,
    Unreadable,
)
from research.text.template import AbstractTemplate, Parsed
from research.text.templates import Alpaca, Chat, Plain, Think
from research.text.tokenizer import build_tokenizer

ALPHABET = "0123456789+-" + Plain.alphabet
SUM = Trace("17+32-09", "49;40", "40", 12)
WORDS = Trace("Add 2, 3 and 4.", "2 + 3 = 5\n5 + 4 = 9", "9", 6)


def plain(**options: object) -> Codec:
    return Codec(build_tokenizer("characters", alphabet=ALPHABET), Plain(), **options)


def numbered(text: str) -> list[int]:
    """An encoder of its own: the place of each character among all, behind pad and EOS."""
    return [sorted({*ALPHABET, "."}).index(character) + 2 for character in text]


# -- documents --------------------------------------------------------------------------------------------------------


TEXTS = {
    "chain_then_answer": "49;40#40",
    "answer_then_chain": "#40:49;40",
    "answer_only": "#40",
    "filler_then_answer": ".....#40",
    "shuffled_chain": "49;40#40",  # arranged beforehand
    "swapped_chain": "49;40#40",
}


@pytest.mark.parametrize("trace_format", TRACE_FORMATS)
def test_ids_against_an_independent_encoder(trace_format: str) -> None:
    codec = plain(trace_format=trace_format)
    document = codec.encode(SUM)
    assert list(document.ids) == numbered("17+32-09=") + numbered(TEXTS[trace_format]) + [1]
    assert (document.prompt_length, document.index) == (9, 12)
    assert codec.decode(document.completion_ids) == TEXTS[trace_format]
    assert codec.layout == TRACE_FORMATS[trace_format]
    assert codec.parse(codec.decode(document.completion_ids)).answer == "40"


@pytest.mark.parametrize("template", [Alpaca(), Think()])
@pytest.mark.parametrize("trace_format", TRACE_FORMATS)
def test_p38_the_mask_holds_completion_and_eos(
    pretrained: PreTrainedTokenizerFast, template: AbstractTemplate, trace_format: str
) -> None:
    codec = Codec(pretrained, template, trace_format=trace_format)
    batch = collate([codec.encode(WORDS)], prompt_loss_weight=0.0, pad_id=codec.pad_id)
    trained = batch.label_BT[batch.weight_BT > 0].tolist()
    assert trained[-1] == codec.eos_ids[0] and codec.eos_ids[0] not in trained[:-1]
    if trace_format == "filler_then_answer":
        return
    assert codec.decode(trained) == template.completion(WORDS.chain, WORDS.answer, codec.layout)


@pytest.mark.parametrize("template", [Alpaca(), Think()])
def test_p39_prompt_and_completion_apart_are_the_document_at_once(
    pretrained: PreTrainedTokenizerFast, template: AbstractTemplate
) -> None:
    codec = Codec(pretrained, template)
    document = codec.encode(WORDS)
    whole = template.prompt(WORDS.problem) + template.completion(WORDS.chain, WORDS.answer, codec.layout)
    assert list(document.ids[:-1]) == pretrained(whole).input_ids
    assert pretrained.decode(document.completion_ids[:1])[:1] != " "


def test_p39_bos_stands_before_the_prompt_and_nowhere_else(llama_like: PreTrainedTokenizerFast) -> None:
    codec = Codec(llama_like, Alpaca())
    document = codec.encode(WORDS)
    assert document.ids[0] == llama_like.bos_token_id and document.ids.count(llama_like.bos_token_id) == 1
    assert codec.prompt_ids(WORDS.problem) == llama_like(Alpaca().prompt(WORDS.problem)).input_ids


@pytest.mark.parametrize("trace_format", TRACE_FORMATS)
def test_c14_generation_starts_from_a_prefix_of_training(
    pretrained: PreTrainedTokenizerFast, trace_format: str
) -> None:
    for template in (Alpaca(), Think()):
        codec = Codec(pretrained, template, trace_format=trace_format, max_prompt_tokens=40)
        for problem in (WORDS.problem, WORDS.problem * 20):
            document = codec.encode(Trace(problem, WORDS.chain, "9", 0))
            assert list(document.ids[: document.prompt_length]) == codec.prompt_ids(problem)


@pytest.mark.parametrize("template", [Alpaca(), Think()])
def test_the_filler_takes_the_place_of_each_token_of_the_chain(
    pretrained: PreTrainedTokenizerFast, template: AbstractTemplate
) -> None:
    chain, filled = (
        Codec(pretrained, template, trace_format=name).encode(WORDS)
        for name in ("chain_then_answer", "filler_then_answer")
    )
    assert len(chain) == len(filled) and chain.prompt_length == filled.prompt_length
    differs = [place for place, (one, two) in enumerate(zip(chain.ids, filled.ids, strict=True)) if one != two]
    assert len({filled.ids[place] for place in differs}) == 1
    assert differs == list(range(differs[0], differs[-1] + 1)), "one stretch, without gaps"
    codec = Codec(pretrained, template, trace_format="filler_then_answer")
    read = codec.parse(codec.decode(filled.completion_ids))
    assert read.answer == "9" and set(read.chain) <= {".", " "} and "5" not in read.chain


def test_p34_later_eos_of_a_list_are_not_trained(gpt2_like: PreTrainedTokenizerFast) -> None:
    """What a sampler wrote, its rows padded with EOS; another EOS of the list ends a completion as well."""
    codec = Codec(gpt2_like, Alpaca(), extra_eos=["<|im_end|>"])
    eos, end = codec.eos_ids
    assert (eos, end) == tuple(gpt2_like.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    assert codec.pad_id == eos
    for written, kept in (
        ((50, 51, eos, eos, eos), (50, 51, eos)),
        ((50, end, eos, eos), (50, end)),
        ((50, 51), (50, 51)),
        ((eos, 50), (eos,)),
        ((), ()),
    ):
        document = codec.join("Why?", written, 3)
        assert document.completion_ids == kept
        assert codec.decode(written) == codec.decode([token for token in kept if token not in codec.eos_ids])
        batch = collate([document], prompt_loss_weight=0.0, pad_id=codec.pad_id)
        assert int((batch.weight_BT > 0).sum()) == len(kept)


def test_p40_ids_in_are_ids_out(gpt2_like: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random ids, most of which decode and encode to others; only the prompt is ever encoded."""
    codec = Codec(gpt2_like, Alpaca())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, codec.vocab_size, (500, 12), generator=generator).tolist()
    encoded: list[str] = []
    start = codec.encoder.start
    monkeypatch.setattr(codec.encoder, "start", lambda text: (encoded.append(text), start(text))[1])
    monkeypatch.setattr(codec.encoder, "middle", lambda text: pytest.fail("a completion was encoded"))
    documents = [codec.join("Why?", row, number) for number, row in enumerate(rows)]
    assert [list(document.completion_ids) for document in documents] == rows
    assert set(encoded) == {Alpaca().prompt("Why?")}
    monkeypatch.undo()
    changed = sum(codec.encoder.middle(codec.decode(row)) != row for row in rows)
    assert changed > 250, "the rows are of the kind that a round trip through text would change"


def test_pieces_are_the_text_token_by_token() -> None:
    codec = plain()
    document = codec.encode(SUM)
    assert codec.pieces(document.ids) == [*"17+32-09=49;40#40", "<eos>"]


def test_padding_is_no_text() -> None:
    codec = plain()
    assert codec.decode([*numbered("49#4"), 0, 0]) == "49#4"
    assert codec.decode([*numbered("49"), 1, *numbered("7")]) == "49"
    assert codec.decode([]) == ""


# -- length -----------------------------------------------------------------------------------------------------------


def test_p37_completions_are_never_cut() -> None:
    full = len(plain().encode(SUM))
    assert plain(max_tokens=full).encode(SUM)
    with pytest.raises(TooLong, match=rf"trace 12 takes {full} tokens, 9 of them prompt, and max_tokens is {full - 1}"):
        plain(max_tokens=full - 1).encode(SUM)


def test_p37_a_cut_prompt_keeps_its_end(llama_like: PreTrainedTokenizerFast) -> None:
    whole, cut = (Codec(llama_like, Alpaca(), max_prompt_tokens=limit) for limit in (None, 30))
    problem = "Tom has 3 apples. " * 10
    ids = cut.prompt_ids(problem)
    assert len(ids) == 30 and ids[0] == llama_like.bos_token_id
    assert ids[1:] == whole.prompt_ids(problem)[-29:]
    assert llama_like.decode(ids).endswith("\n\n### Response:\n")
    assert cut.prompt_ids("Add 2") == whole.prompt_ids("Add 2")
    trace = Trace(problem, WORDS.chain, WORDS.answer, 0)
    assert cut.encode(trace).completion_ids == whole.encode(trace).completion_ids


def test_p37_a_limit_that_would_cut_the_marker_of_generation_is_refused(llama_like: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"max_prompt_tokens=4: give at least \d+, the template's text after"):
        Codec(llama_like, Alpaca(), max_prompt_tokens=4)
    with pytest.raises(ValueError, match="less than max_tokens=64"):
        Codec(llama_like, Alpaca(), max_prompt_tokens=64, max_tokens=64)


# -- refusals ---------------------------------------------------------------------------------------------------------


REFUSED = [
    (Trace("1+2", "", "3", 1), EmptyChain, "trace 1 has no chain, which trace_format=chain_then_answer writes"),
    (Trace("1+2", " \n", "3", 1), EmptyChain, "no chain"),
    (Trace("1+2", "3", "", 1), MissingAnswer, "trace 1 has no answer"),
    (Trace("1+2", "3", "  ", 1), MissingAnswer, "no answer"),
    (Trace("1+2", "3" * 600, "3", 1), TooLong, "takes 607 tokens"),
    (Trace("one", "3", "3", 1), UnknownCharacter, "no token for 'eno' in 'one='"),
    (Trace("1+2", "3!", "3", 1), UnknownCharacter, "no token for '!'"),
    (Trace("1+2", "3<eos>", "3", 1), ControlToken, "the chain spells the special token '<eos>'"),
    (Trace("1<pad>", "3", "3", 1), ControlToken, "the problem spells"),
    (Trace("1+2", "3", "<eos>", 1), ControlToken, "the answer spells"),
    (Trace("1+2", "1#2;3", "3", 1), Unreadable, "written with Plain in chain_then_answer"),
    (Trace("1+2", "1+2=3", "3", 1), Unreadable, "marks of the template"),
    (Trace("1+2", "3", "1=1", 1), Unreadable, "marks of the template"),
]


@pytest.mark.parametrize(("trace", "kind", "message"), REFUSED)
def test_rows_that_cannot_be_encoded_say_why(trace: Trace, kind: type[Refused], message: str) -> None:
    with pytest.raises(kind, match=message):
        plain().encode(trace)


def test_refused_rows_are_counted_by_reason() -> None:
    traces = [SUM, *(trace for trace, _, _ in REFUSED), SUM]
    documents, refused = plain().encode_all(iter(traces))
    assert [document.index for document in documents] == [12, 12]
    assert refused == {
        "empty_chain": 2,
        "missing_answer": 2,
        "too_long": 1,
        "unknown_character": 2,
        "control_token": 3,
        "unreadable": 3,
    }
    assert len(documents) + sum(refused.values()) == len(traces)


def test_a_problem_may_hold_what_a_chain_may_not() -> None:
    assert plain().encode(Trace("1=1#;:+2", "3", "3", 0)).prompt_length == len("1=1#;:+2=")


def test_an_answer_alone_needs_no_chain() -> None:
    assert plain(trace_format="answer_only").encode(Trace("1+2", "", "3", 1)).ids[-2:] == (numbered("3")[0], 1)
    allowed = plain(allow_empty_chain=True)
    assert allowed.decode(allowed.encode(Trace("1+2", "", "3", 1)).completion_ids) == "#3"
    assert allowed.decode(allowed.encode(SUM).completion_ids) == "49;40#40"


def test_text_outside_a_pretrained_vocabulary_is_refused_not_replaced(
    gpt2_like: PreTrainedTokenizerFast,
    llama_like: PreTrainedTokenizerFast,
    llama_like_without_unknown: PreTrainedTokenizerFast,
) -> None:
    """Bytes write anything; other tokenizers write an unknown token or, where they have none, nothing at all."""
    trace = Trace("Add 2.", "漢字 5", "9", 0)
    codec = Codec(gpt2_like, Alpaca())
    assert codec.parse(codec.decode(codec.encode(trace).completion_ids)) == Parsed("漢字 5", "9")
    assert llama_like.unk_token_id in llama_like("漢").input_ids
    assert llama_like_without_unknown("漢").input_ids == llama_like_without_unknown(" ").input_ids
    for tokenizer in (llama_like, llama_like_without_unknown):
        with pytest.raises(UnknownCharacter, match="no token for a part of"):
            Codec(tokenizer, Alpaca()).encode(trace)


def test_p39_a_reply_behind_a_special_token_is_that_of_the_whole(pretrained: PreTrainedTokenizerFast) -> None:
    """Some tokenizers write a space there too, and some do not: the document follows its tokenizer."""
    pretrained.add_special_tokens({"extra_special_tokens": ["<|assistant|>"]})
    pretrained.chat_template = (
        "{% for m in messages %}<|assistant|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    codec = Codec(pretrained, Chat(pretrained))
    whole = codec.template.prompt("Add 2.") + codec.template.completion("2", "2", codec.layout)
    ids = codec.encode(Trace("Add 2.", "2", "2", 0)).ids
    assert list(ids[:-1]) == pretrained(whole, add_special_tokens=False).input_ids


def test_a_truncation_left_behind_by_another_call_cuts_nothing(gpt2_like: PreTrainedTokenizerFast) -> None:
    codec = Codec(gpt2_like, Alpaca())
    before = codec.encode(WORDS)
    gpt2_like(WORDS.chain, truncation=True, max_length=4, padding="max_length")
    assert codec.encode(WORDS) == before


def test_options_that_cannot_work_are_refused(gpt2_like: PreTrainedTokenizerFast) -> None:
    for options, message in (
        ({"trace_format": "chain"}, "trace_format='chain': give one of"),
        ({"prompt_loss_weight": -0.1}, r"prompt_loss_weight=-0\.1: give a number from 0 to 1"),
        ({"max_tokens": 2}, "max_tokens=2: give at least 3"),
        ({"extra_eos": ["<stop>"]}, "extra_eos holds '<stop>', which is no token"),
    ):
        with pytest.raises(ValueError, match=message):
            plain(**options)
    gpt2_like.eos_token = None
    with pytest.raises(ConfigError, match="has no EOS token"):
        Codec(gpt2_like, Alpaca())


def test_a_filler_that_the_tokenizer_cannot_write_is_refused(llama_like: PreTrainedTokenizerFast) -> None:
    bare = build_tokenizer("characters", alphabet=ALPHABET)
    words = {word: place for place, word in enumerate(word for word in bare.get_vocab() if word != ".")}
    bare.backend_tokenizer.model = type(bare.backend_tokenizer.model)(words)
    with pytest.raises(ConfigError, match=r"no single token for the filler '\.'"):
        Codec(bare, Plain(), trace_format="filler_then_answer")


# -- identity ---------------------------------------------------------------------------------------------------------


def test_p25_the_fingerprint_moves_with_all_that_decides_the_ids() -> None:
    codec = plain()
    assert codec.fingerprint() == plain().fingerprint()
    assert codec.fingerprint() == plain(max_tokens=64, prompt_loss_weight=0.5).fingerprint()
    others = [
        plain(trace_format="answer_only"),
        plain(trace_format="filler_then_answer"),
        plain(trace_format="shuffled_chain"),
        plain(max_prompt_tokens=20),
        plain(allow_empty_chain=True),
        plain(extra_eos=[5]),
        Codec(build_tokenizer("characters", alphabet=ALPHABET + "*"), Plain()),
    ]
    prints = [codec.fingerprint(), *(other.fingerprint() for other in others)]
    assert len(set(prints)) == len(prints)


def test_p30_ids_lie_below_the_vocabulary_size(gpt2_like: PreTrainedTokenizerFast) -> None:
    """Added tokens count, which a tokenizer's own vocab_size leaves out."""
    gpt2_like.add_tokens(["apples"])
    codec = Codec(gpt2_like, Alpaca())
    assert codec.vocab_size == len(gpt2_like) > gpt2_like.vocab_size - 1
    assert max(codec.encode(Trace("p", "apples", "9", 0)).ids) == codec.vocab_size - 1


@pytest.mark.parametrize("template", [Plain(), Alpaca(), Think()], ids=lambda template: type(template).__name__)
def test_a_marked_codec_asks_for_a_mode(template: AbstractTemplate, gpt2_like: PreTrainedTokenizerFast) -> None:
    """The mark stands behind the problem and nowhere else; the codec that it was made from asks for nothing."""
    plain = Codec(gpt2_like, template)
    marks = {mode: template.mode_marks[mode] for mode in MODES}
    for mark in marks.values():
        asking = plain.marked(mark)
        assert asking.prompt_ids("1+2") == plain.prompt_ids(f"1+2{mark}") != plain.prompt_ids("1+2")
        trace = Trace("1+2", "3", "3", 0)
        assert asking.encode(trace).completion_ids == plain.encode(trace).completion_ids
        assert asking.fingerprint() != plain.fingerprint() == asking.marked("").fingerprint()
    assert len(set(marks.values())) == 2 and plain.mark == ""
