"""Chat templates: what the generation prompt opens, what a finished turn keeps, and whose end of turn counts."""

import pytest
from transformers import PreTrainedTokenizerFast

from research.errors import ConfigError
from research.records import Trace
from research.text.codec import Codec
from research.text.template import LAYOUTS, Parsed
from research.text.templates import Alpaca, Chat

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = TURNS + ASK
# Qwen3's habit: reasoning is cut out of the content and written again in its own form
REWRITES_IN_FORM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "<think>\n{{ parts[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + ASK
    + "{% if add_generation_prompt and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
# DeepSeek-R1-Distill's: the reasoning of finished turns is dropped, the prompt opens the next one
DROPS = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}</s>{% else %}{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
REWRAPS = CHATML.replace("{{ m.content }}", "{{ m.content | replace('think>', 'reasoning>') }}")
# Llama-2's: a blank on either side of the reply
BLANKS = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
TRACE = Trace("Add 2, 3 and 4.", "2 + 3 = 5\n5 + 4 = 9", "9", 6)


def chat(tokenizer: PreTrainedTokenizerFast, template: str, **options: object) -> Chat:
    tokenizer.chat_template = template
    return Chat(tokenizer, **options)


@pytest.mark.parametrize("template", [CHATML, REWRITES_IN_FORM])
@pytest.mark.parametrize("layout", ["chain_then_answer", "answer_only"])
def test_p38_the_reply_is_what_the_template_would_write(
    gpt2_like: PreTrainedTokenizerFast, template: str, layout: str
) -> None:
    room = chat(gpt2_like, template)
    written = room.prompt(TRACE.problem) + room.completion(TRACE.chain, TRACE.answer, layout)
    chain = TRACE.chain if layout == "chain_then_answer" else ""
    assert written == (
        f"<|im_start|>user\nAdd 2, 3 and 4.<|im_end|>\n<|im_start|>assistant\n<think>\n{chain}\n</think>\n\n9"
    )
    reply = written[len(room.prompt(TRACE.problem)) :]
    turns = [{"role": "user", "content": TRACE.problem}, {"role": "assistant", "content": reply}]
    assert gpt2_like.apply_chat_template(turns, tokenize=False) == written + "<|im_end|>\n"
    assert room.parse(reply, layout) == Parsed(chain, "9")


@pytest.mark.parametrize("template", [CHATML, REWRITES_IN_FORM])
def test_p38_what_is_trained_on_is_reasoning_answer_and_end_of_turn(
    gpt2_like: PreTrainedTokenizerFast, template: str
) -> None:
    codec = Codec(gpt2_like, chat(gpt2_like, template))
    document = codec.encode(TRACE)
    trained = gpt2_like.decode(document.completion_ids, skip_special_tokens=False)
    assert trained == "<think>\n2 + 3 = 5\n5 + 4 = 9\n</think>\n\n9<|im_end|>"
    assert codec.eos_ids == tuple(gpt2_like.convert_tokens_to_ids(["<|im_end|>", "</s>"]))
    assert codec.parse(codec.decode(document.completion_ids)) == Parsed(TRACE.chain, TRACE.answer)


def test_p34_markers_of_the_prompt_are_attended_and_only_the_last_end_of_turn_is_trained(
    gpt2_like: PreTrainedTokenizerFast,
) -> None:
    """The end of turn stands in the prompt too, and pad is an EOS."""
    codec = Codec(gpt2_like, chat(gpt2_like, CHATML, system="Be brief."))
    document = codec.encode(TRACE)
    end = codec.eos_ids[0]
    assert document.ids.count(end) == 3 and document.ids[: document.prompt_length].count(end) == 2
    assert document.completion_ids.count(end) == 1 and document.ids[-1] == end


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("template", [CHATML, BLANKS])
def test_p39_turns_tokenised_apart_are_the_whole_tokenised_at_once(
    pretrained: PreTrainedTokenizerFast, template: str, turns: int
) -> None:
    """A conversation grown turn by turn, each part encoded alone, against its rendering encoded in one go."""
    if template == CHATML:
        pretrained.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    codec = Codec(pretrained, chat(pretrained, template))
    end = "<|im_end|>\n" if template == CHATML else "</s>"
    encoder, ids, text = codec.encoder, [], ""
    for turn in range(turns):
        prompt = codec.template.prompt(f"Add 2, 3 and {turn}.")
        reply = codec.template.completion(f"2 + 3 = 5\n5 + {turn} = {turn + 5}", str(turn + 5), codec.layout)
        ids += encoder.middle(prompt, encoder.special_end(text)) if turn else encoder.start(prompt)
        ids += encoder.middle(reply) + encoder.middle(end)
        text += prompt + reply + end
    special = {pretrained.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")}
    assert special & set(ids)
    assert ids == pretrained(text, add_special_tokens=False).input_ids


def test_p39_a_template_that_writes_its_own_bos_gets_no_second_one(llama_like: PreTrainedTokenizerFast) -> None:
    bos = llama_like.bos_token_id
    codec = Codec(llama_like, chat(llama_like, BLANKS))
    assert codec.encode(TRACE).ids.count(bos) == 1
    assert codec.prompt_ids(TRACE.problem)[0] == bos
    assert codec.template.completion("c", "9", "chain_then_answer").startswith(" <think>")
    assert Codec(llama_like, Alpaca()).prompt_ids(TRACE.problem).count(bos) == 1


def test_p41_two_templates_share_the_ids_of_the_response(gpt2_like: PreTrainedTokenizerFast) -> None:
    student, teacher = Codec(gpt2_like, Alpaca()), Codec(gpt2_like, chat(gpt2_like, CHATML))
    written = student.encode(TRACE).completion_ids
    under_student = student.join(TRACE.problem, written, 6)
    under_teacher = teacher.join(TRACE.problem, written, 6)
    assert under_student == student.encode(TRACE)
    assert under_teacher.completion_ids == under_student.completion_ids
    assert under_teacher.ids[: under_teacher.prompt_length] == tuple(teacher.prompt_ids(TRACE.problem))
    assert student.fingerprint() != teacher.fingerprint()
    assert teacher.fingerprint() == Codec(gpt2_like, chat(gpt2_like, CHATML)).fingerprint()
    assert teacher.fingerprint() != Codec(gpt2_like, chat(gpt2_like, CHATML, system="Be brief.")).fingerprint()


@pytest.mark.parametrize("template", [DROPS, REWRAPS])
def test_p38_a_template_that_drops_or_rewraps_the_reasoning_is_refused_and_shown(
    gpt2_like: PreTrainedTokenizerFast, template: str
) -> None:
    room = chat(gpt2_like, template)
    with pytest.raises(ConfigError, match="drops or rewraps the reasoning") as refused:
        Codec(gpt2_like, room)
    rendered = {DROPS: "assistant: \n\nIt is 9.</s>", REWRAPS: "<reasoning>\n2 + 3 = 5"}[template]
    assert rendered in str(refused.value) and "accept_rewriting=true" in str(refused.value)


def test_p38_replies_are_right_where_rewriting_is_accepted(gpt2_like: PreTrainedTokenizerFast) -> None:
    """The prompt opens the reasoning, so the reply does not open it again; it ends in the tokenizer's EOS."""
    codec = Codec(gpt2_like, chat(gpt2_like, DROPS, accept_rewriting=True))
    document = codec.encode(TRACE)
    assert gpt2_like.decode(document.ids) == (
        "user: Add 2, 3 and 4.\nassistant: <think>\n2 + 3 = 5\n5 + 4 = 9\n</think>\n\n9</s>"
    )
    assert codec.decode(document.completion_ids).startswith("2 + 3")
    assert codec.parse(codec.decode(document.completion_ids)) == Parsed(TRACE.chain, "9")
    assert codec.parse("2 + 3, well") == Parsed("2 + 3, well", None)
    only = Codec(gpt2_like, chat(gpt2_like, DROPS, accept_rewriting=True), trace_format="answer_only")
    assert gpt2_like.decode(only.encode(TRACE).ids).endswith("assistant: <think>\n\n</think>\n\n9</s>")
    with pytest.raises(ConfigError, match="leaves no room for answer_then_chain"):
        Codec(gpt2_like, chat(gpt2_like, DROPS, accept_rewriting=True), trace_format="answer_then_chain")


def test_reasoning_cut_out_of_its_place_is_dropped_reasoning(gpt2_like: PreTrainedTokenizerFast) -> None:
    """A template of Qwen3's kind keeps a chain before the answer; one behind the answer costs the answer."""
    with pytest.raises(ConfigError, match="drops or rewraps"):
        Codec(gpt2_like, chat(gpt2_like, REWRITES_IN_FORM), trace_format="answer_then_chain")
    assert Codec(gpt2_like, chat(gpt2_like, CHATML), trace_format="answer_then_chain").encode(TRACE)


def test_a_prompt_that_closes_the_reasoning_has_room_for_the_answer_alone(
    gpt2_like: PreTrainedTokenizerFast,
) -> None:
    room = chat(gpt2_like, REWRITES_IN_FORM, options={"enable_thinking": False})
    assert room.prompt("Why?").endswith("assistant\n<think>\n\n</think>\n\n")
    assert room.completion("", "9", "answer_only") == "9"
    assert room.parse(" 9", "answer_only") == Parsed("", "9")
    for layout in ("chain_then_answer", "answer_then_chain"):
        with pytest.raises(
            ConfigError, match=f"(?s)leaves no room for {layout}.*enable_thinking.*assistant\n<think>"
        ) as e:
            room.check(layout)
        assert "Add 2, 3 and 4." in str(e.value)


def test_other_templates_that_cannot_work_are_refused(gpt2_like: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        Chat(gpt2_like)
    with pytest.raises(ConfigError, match="drops the problem"):
        chat(gpt2_like, "hello{{ messages | length }}").check()
    with pytest.raises(ConfigError, match="cannot render turns of system, user: no system turn"):
        chat(gpt2_like, BLANKS, system="Be brief.").check()
    with pytest.raises(ValueError, match="layout='chain_first'"):
        chat(gpt2_like, CHATML).check("chain_first")


def test_every_layout_of_a_plain_chat_is_read_back(gpt2_like: PreTrainedTokenizerFast) -> None:
    room = chat(gpt2_like, CHATML)
    for layout in LAYOUTS:
        read = room.parse(room.completion(TRACE.chain, "9", layout), layout)
        assert read == Parsed("" if layout == "answer_only" else TRACE.chain, "9")


def test_the_end_of_turn_is_the_whole_special_token(gpt2_like: PreTrainedTokenizerFast) -> None:
    """Not another one that it begins with."""
    gpt2_like.add_special_tokens({"extra_special_tokens": ["<|im_end", "<|im_end|>", "<|im_start|>"]})
    assert chat(gpt2_like, CHATML).check().end == "<|im_end|>"
