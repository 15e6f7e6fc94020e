"""Completions of a local model against `model.generate`, exact distributions and one-row loops."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from research.errors import ConfigError
from research.generation.base import Prompt, Written
from research.generation.in_process import LocalGenerator, causal_language_model
from research.models.weights import weights_sha256
from research.records import Completion, Sampling
from research.text.codec import Codec
from research.text.templates import Plain
from research.text.tokenizer import build_tokenizer

Build = Callable[..., Any]
RAGGED = (2, 9, 5, 5, 1, 7, 3, 9)
SAMPLED = Sampling(num_samples=3, temperature=0.8, top_p=0.9, max_new_tokens=12, seed=4)


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[Prompt]:
    """Random ids, never pad or EOS; indices neither sorted nor consecutive."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 31, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt((7 * number + 3) % 101, f"prompt {number}", tuple(ids)) for number, ids in enumerate(rows)]


def written(generator: LocalGenerator, prompts: Sequence[Prompt], sampling: Sampling) -> dict[int, Written]:
    results = list(generator.generate(prompts, sampling))
    assert sorted(result.index for result in results) == sorted(prompt.index for prompt in prompts)
    return {result.index: result for result in results}


def texts(results: dict[int, Written]) -> dict[int, list[tuple[tuple[int, ...], str]]]:
    return {index: [(each.ids, each.stop) for each in result.completions] for index, result in results.items()}


def one_row_greedy(model: Any, ids: Sequence[int], limit: int, eos: Sequence[int]) -> list[int]:
    """No cache, no batch, no padding: the whole sequence is run again for every token."""
    grown: list[int] = []
    while len(grown) < limit and not (grown and grown[-1] in eos):
        logits_V = model(torch.tensor([[*ids, *grown]])).logits[0, -1]
        grown.append(int(logits_V.argmax()))
    return grown


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@torch.no_grad()
def test_greedy_writes_what_generate_writes(family: str, language_model: Build, spelled: Any) -> None:
    model, prompts = language_model(family), prompts_of(RAGGED)
    width = max(RAGGED)
    ids_BT = torch.tensor([[0] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in prompts])
    expected_BT = model.generate(
        ids_BT, attention_mask=(ids_BT != 0).long(), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    results = written(LocalGenerator(model, spelled), prompts, Sampling(max_new_tokens=20))
    stops = Counter()
    for prompt, expected_T in zip(prompts, expected_BT[:, width:].tolist(), strict=True):
        (completion,) = results[prompt.index].completions
        assert list(completion.ids) == expected_T[: len(completion.ids)]
        assert set(expected_T[len(completion.ids) :]) <= {0}
        assert completion.stop == ("eos" if 1 in expected_T else "length")
        stops[completion.stop] += 1
    assert len(stops) == 2 or family != "llama", "the example should hold both ways to stop"


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_batch_changes_a_completion(family: str, batch_rows: int, language_model: Build, spelled: Any) -> None:
    """The batch's size, its order and who else is in it; padding and its mask come and go with them."""
    model, prompts = language_model(family, dtype=torch.float64), prompts_of(RAGGED)
    reference = written(LocalGenerator(model, spelled), prompts, SAMPLED)
    generator = LocalGenerator(model, spelled, batch_rows=batch_rows)
    assert texts(written(generator, prompts[::-1], SAMPLED)) == texts(reference)
    some = written(generator, prompts[2:4], SAMPLED)
    assert texts(some) == {prompt.index: texts(reference)[prompt.index] for prompt in prompts[2:4]}
    for index, result in some.items():
        for mine, other in zip(result.completions, reference[index].completions, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-9)


def test_a_completion_depends_on_seed_index_and_sample_alone(language_model: Build, spelled: Any) -> None:
    generator = LocalGenerator(language_model("llama", dtype=torch.float64), spelled)
    one, *_ = prompts_of((6,))
    other = Prompt(one.index + 1, one.text, one.ids)
    sampling = Sampling(num_samples=4, temperature=1.0, max_new_tokens=16, seed=1)
    results = written(generator, [one, other], sampling)
    firsts = [completion.ids for result in results.values() for completion in result.completions]
    assert len(set(firsts)) == 8, "streams are shared"
    fewer = written(generator, [one], Sampling(2, 1.0, 1.0, 5, 1))[one.index].completions
    for short, long in zip(fewer, results[one.index].completions, strict=False):
        assert short.ids == long.ids[:5], "a smaller limit or number of samples moved the stream"
    reseeded = written(generator, [one], Sampling(4, 1.0, 1.0, 16, 2))[one.index].completions
    assert not {completion.ids for completion in reseeded} & set(firsts)


def test_p35_prompts_of_two_and_nine_tokens_are_the_one_row_loop(language_model: Build, spelled: Any) -> None:
    model, prompts = language_model("qwen3", dtype=torch.float64), prompts_of((2, 9))
    results = written(LocalGenerator(model, spelled), prompts, Sampling(max_new_tokens=15))
    for prompt in prompts:
        with torch.no_grad():
            expected = one_row_greedy(model, prompt.ids, 15, (1,))
        assert list(results[prompt.index].completions[0].ids) == expected


def test_p40_ids_are_kept_and_never_encoded_again(language_model: Build, spelled: Any) -> None:
    """`spelled.encode` raises; decoding is called on the drawn ids without the EOS, once each."""
    generator, prompts = LocalGenerator(language_model("llama"), spelled), prompts_of(RAGGED)
    completions = [each for result in written(generator, prompts, SAMPLED).values() for each in result.completions]
    bare = [list(each.ids[:-1] if each.stop == "eos" else each.ids) for each in completions]
    assert sorted(spelled.decoded) == sorted(bare)
    assert {each.stop for each in completions} == {"eos", "length"}
    for each, ids in zip(completions, bare, strict=True):
        assert each.text == " ".join(map(str, ids)) and (each.ids[-1] == 1) == (each.stop == "eos")


def test_any_id_of_a_list_of_eos_ends_a_completion(language_model: Build, spelled: Any) -> None:
    model, prompts = language_model("llama"), prompts_of(RAGGED)
    sampling = Sampling(1, 1.0, 1.0, 30, 0)
    for eos in ((1,), (1, 5, 9), range(2, 31)):
        for result in written(LocalGenerator(model, spelled, eos_ids=eos), prompts, sampling).values():
            (completion,) = result.completions
            assert not set(completion.ids[:-1]) & set(eos)
            assert completion.stop == ("eos" if completion.ids[-1] in eos else "length")
            assert completion.stop == "eos" or len(completion.ids) == 30


def test_one_new_token(language_model: Build, spelled: Any) -> None:
    model, prompts = language_model("gpt2"), prompts_of(RAGGED)
    results = written(LocalGenerator(model, spelled), prompts, Sampling(max_new_tokens=1))
    for prompt in prompts:
        (completion,) = results[prompt.index].completions
        with torch.no_grad():
            assert list(completion.ids) == one_row_greedy(model, prompt.ids, 1, ())


def test_greedy_samples_are_copies(language_model: Build, spelled: Any) -> None:
    generator = LocalGenerator(language_model("llama"), spelled)
    results = written(generator, prompts_of((4, 6)), Sampling(num_samples=3, max_new_tokens=5))
    for result in results.values():
        assert len(result.completions) == 3 and len(set(result.completions)) == 1
    assert generator.spent.tokens == sum(len(result.completions[0].ids) for result in results.values())


# -- the distribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
@torch.no_grad()
def test_p60_draws_follow_the_exact_distribution(
    temperature: float, top_p: float, language_model: Build, spelled: Any
) -> None:
    """Pairs of tokens, whose probabilities are enumerated; a penalty in generation_config must not be seen."""
    model = language_model("llama")
    model.generation_config.update(repetition_penalty=1.8, top_k=2, do_sample=True, min_p=0.2)
    prompt, draws = Prompt(3, "", (5, 6, 7)), 20_000

    def exact(ids: Sequence[int]) -> Tensor:
        probs_V = (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
        sorted_V, order_V = probs_V.sort(descending=True)
        size = int((sorted_V.cumsum(0) < top_p - 1e-12).sum()) + 1
        kept_V = torch.zeros_like(probs_V)
        kept_V[order_V[:size]] = sorted_V[:size]
        return kept_V / kept_V.sum()

    first_V = exact(prompt.ids)
    pairs = {
        (token, other): float(first_V[token] * probs)
        for token in range(31)
        if first_V[token] > 0
        for other, probs in enumerate(exact((*prompt.ids, token)))
        if probs > 0
    }
    generator = LocalGenerator(model, spelled, eos_ids=(), batch_rows=4096)
    result = written(generator, [prompt], Sampling(draws, temperature, top_p, 2, 0))[3]
    counts = Counter(completion.ids for completion in result.completions)
    assert set(counts) <= set(pairs), "a token outside the top-p set"
    common = [pair for pair, prob in pairs.items() if prob * draws >= 8]
    seen = [counts[pair] for pair in common]
    expected = [pairs[pair] * draws for pair in common]
    assert len(common) > 15
    if len(common) < len(pairs):
        seen, expected = [*seen, draws - sum(seen)], [*expected, draws - sum(expected)]
    assert chisquare(seen, expected).pvalue > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_p60_logprob_is_that_of_a_plain_forward(family: str, language_model: Build, spelled: Any) -> None:
    model, prompts = language_model(family), prompts_of(RAGGED)
    by_index = {prompt.index: prompt for prompt in prompts}

    def plain(prompt: Prompt, completion: Completion, temperature: float) -> float:
        ids = torch.tensor([[*prompt.ids, *completion.ids]])
        logprobs_TV = (model(ids).logits[0] / temperature).log_softmax(-1)
        start = len(prompt.ids) - 1
        return sum(float(logprobs_TV[start + place, token]) for place, token in enumerate(completion.ids))

    for sampling in (Sampling(2, 1.0, 1.0, 12, 0), Sampling(2, 0.6, 1.0, 12, 0), Sampling(1, 0.0, 1.0, 12, 0)):
        for index, result in written(LocalGenerator(model, spelled), prompts, sampling).items():
            for completion in result.completions:
                expected = plain(by_index[index], completion, sampling.temperature or 1.0)
                assert completion.logprob == pytest.approx(expected, abs=1e-4)


# -- the network is left as it was ------------------------------------------------------------------------------------


def test_p65_dropout_is_off_no_graph_is_kept_and_modes_come_back(language_model: Build, spelled: Any) -> None:
    model = language_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    model.transformer.h[1].eval()  # a frozen part
    modes = [part.training for part in model.modules()]
    logits: list[Tensor] = []
    model.register_forward_hook(lambda _, __, output: logits.append(output.logits))
    generator, prompts = LocalGenerator(model, spelled, batch_rows=3), prompts_of(RAGGED)
    between = generator.generate(prompts, Sampling(max_new_tokens=8))
    first = {}
    for result in between:
        first[result.index] = result
        assert [part.training for part in model.modules()] == modes, "modes stay changed between two results"
        assert torch.is_grad_enabled()
    assert texts(written(generator, prompts, Sampling(max_new_tokens=8))) == texts(first)
    assert logits and not any(tensor.requires_grad or tensor.is_inference() for tensor in logits)


def test_p65_modes_come_back_after_an_error(language_model: Build, spelled: Any) -> None:
    model = language_model("llama").train()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite at generated token 0"):
        list(LocalGenerator(model, spelled).generate(prompts_of((3,)), Sampling()))
    assert all(part.training for part in model.modules()) and torch.is_grad_enabled()


def test_p65_new_weights_are_sampled_and_named_at_once(language_model: Build, spelled: Any) -> None:
    model, prompts = language_model("llama"), prompts_of(RAGGED)
    generator = LocalGenerator(model, spelled)
    before, name = texts(written(generator, prompts, SAMPLED)), generator.identity
    model.load_state_dict(language_model("llama", seed=9).state_dict())
    fresh = LocalGenerator(language_model("llama", seed=9), spelled)
    after = texts(written(generator, prompts, SAMPLED))
    assert after == texts(written(fresh, prompts, SAMPLED)) and after != before
    assert generator.identity == fresh.identity != name
    assert generator.identity["weights_sha256"] == weights_sha256(model)
    size = generator.identity["parameters"]
    assert (
        size == model.num_parameters()
        and LocalGenerator(model.requires_grad_(False), spelled).identity["parameters"] == size
    )


def test_autocast_of_the_caller_keeps_its_gradients(language_model: Build, spelled: Any) -> None:
    """Casts that autocast would remember from here, without gradients, must not reach the caller's training step."""
    model = language_model("llama").train()
    with torch.autocast("cpu", torch.bfloat16):
        list(LocalGenerator(model, spelled).generate(prompts_of((3,)), Sampling(max_new_tokens=2)))
        model(torch.tensor([[2, 3, 4]])).logits.float().square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_bfloat16_is_a_model_in_bfloat16_and_leaves_the_weights(language_model: Build, spelled: Any) -> None:
    model, prompts = language_model("llama", tie_word_embeddings=True), prompts_of(RAGGED)
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}
    generator = LocalGenerator(model, spelled, dtype="bfloat16")
    rounded = language_model("llama", tie_word_embeddings=True)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = texts(written(LocalGenerator(rounded, spelled), prompts, SAMPLED))
    assert texts(written(generator, prompts, SAMPLED)) == expected
    assert generator.identity["dtype"] == "bfloat16"
    for name, parameter in model.named_parameters():
        pointer, values = before[name]
        assert parameter.data_ptr() == pointer and parameter.dtype == torch.float32 and parameter.equal(values)


# -- padded heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["codec", "tokenizer"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_p18_a_padded_head_never_yields_an_id_outside_the_tokenizer(
    given: str, temperature: float, language_model: Build
) -> None:
    """Rows that would win every draw; the last token of the tokenizer, which may be one that was added, is drawn."""
    tokenizer = build_tokenizer("characters", alphabet="0123456789" + Plain.alphabet)
    codec, size = Codec(tokenizer, Plain()), tokenizer.vocab_size
    if given == "tokenizer":
        size += tokenizer.add_tokens(["<added>"])
    assert size < 31
    model = language_model("llama")
    with torch.no_grad():
        model.lm_head.weight[size:] *= 50
        model.lm_head.weight[size - 1] *= 5
    generator = LocalGenerator(model, codec if given == "codec" else tokenizer)
    prompts = [Prompt(number, "", (2, 3, 4 + number)) for number in range(8)]
    results = written(generator, prompts, Sampling(num_samples=4, temperature=temperature, max_new_tokens=12))
    drawn = {token for result in results.values() for each in result.completions for token in each.ids}
    assert drawn <= set(range(size)) and size - 1 in drawn


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_finished_rows_leave_and_a_prompt_runs_once(language_model: Build, spelled: Any) -> None:
    model, prompts = language_model("llama"), prompts_of((4, 4, 6, 6))
    rows: list[tuple[int, int]] = []
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: rows.append(tuple(given[0].shape)))
    generator = LocalGenerator(model, spelled)
    results = written(generator, prompts, Sampling(8, 1.0, 1.0, 30, 0))
    lengths = [len(each.ids) for result in results.values() for each in result.completions]
    assert len(set(lengths)) > 5, "the example should hold many lengths"
    assert rows[0] == (4, 6), "one row per prompt, whatever the number of samples"
    # the token drawn at step n is fed only where the row goes on
    assert [count for count, _ in rows[1:]] == [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert {width for _, width in rows[1:]} == {1}
    assert generator.spent.tokens == sum(lengths) and generator.spent.prompt_tokens == 20


@pytest.mark.parametrize("batch_rows", [3, 4, 5, 7, 256])
def test_a_prompt_runs_once_whatever_the_batch(batch_rows: int, language_model: Build, spelled: Any) -> None:
    """Three samples of each prompt: batches end where a prompt does, so that what is spent does not depend on them."""
    model, prompts = language_model("llama", dtype=torch.float64), prompts_of(RAGGED)
    reference = LocalGenerator(model, spelled)
    expected = texts(written(reference, prompts, SAMPLED))
    passes: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: passes.append(given[0].shape[0]))
    generator = LocalGenerator(model, spelled, batch_rows=batch_rows)
    assert texts(written(generator, prompts, SAMPLED)) == expected
    spent, whole = generator.spent, reference.spent
    assert (spent.prompt_tokens, spent.tokens) == (whole.prompt_tokens, whole.tokens)
    assert spent.prompt_tokens == sum(RAGGED) and spent.prompt_flops == whole.prompt_flops
    assert spent.flops == pytest.approx(whole.flops, rel=1e-12)
    assert max(passes) <= batch_rows


def test_a_prompt_of_more_samples_than_rows_is_counted_in_every_batch(language_model: Build, spelled: Any) -> None:
    """Two prompts of five samples in batches of four: the rows are 4, 1 + 3, 2, and each prompt runs twice."""
    generator = LocalGenerator(language_model("llama"), spelled, batch_rows=4)
    list(generator.generate(prompts_of((4, 6)), Sampling(5, 1.0, 1.0, 8, 0)))
    assert generator.spent.prompt_tokens == 2 * (4 + 6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flops_are_those_of_torchs_counter(family: str, language_model: Build, spelled: Any) -> None:
    """Prompts of one token, where no attention is spent on what the causal mask hides."""
    model = language_model(family, attn_implementation="eager")
    generator = LocalGenerator(model, spelled, eos_ids=())
    prompts = prompts_of((1, 1, 1))
    counter = FlopCounterMode(display=False)
    with counter:
        list(generator.generate(prompts, Sampling(max_new_tokens=9)))
    assert generator.spent.flops == counter.get_total_flops()
    before = generator.spent
    list(generator.generate(prompts, Sampling(max_new_tokens=9)))
    after = generator.spent - before
    assert (after.prompt_tokens, after.tokens, after.flops) == (3, 27, before.flops)
    assert after.seconds > 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_prompts_pass_is_told_apart(family: str, language_model: Build, spelled: Any) -> None:
    model = language_model(family, attn_implementation="eager")
    generator = LocalGenerator(model, spelled, eos_ids=())
    list(generator.generate(prompts_of((1, 1, 1)), Sampling(2, 1.0, 1.0, 9, 0)))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(3, 1, dtype=torch.int64), logits_to_keep=1)
    spent = generator.spent
    prefill, rollout = spent.prefill(), spent.rollout()
    assert prefill["flops"] == counter.get_total_flops() and prefill["tokens"] == 3
    assert rollout["tokens"] == 3 * 2 * 9 and rollout["flops"] == spent.flops - counter.get_total_flops() > 0
    assert 0 < prefill["seconds"] < spent.seconds and rollout["seconds"] == spent.seconds - prefill["seconds"]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_the_context_is_never_passed(language_model: Build, spelled: Any) -> None:
    """48 places: GPT-2 has no embedding for a 49th."""
    generator = LocalGenerator(language_model("gpt2"), spelled, eos_ids=())
    prompts = prompts_of((40, 47, 3))
    results = written(generator, prompts, Sampling(max_new_tokens=20))
    assert [len(results[prompt.index].completions[0].ids) for prompt in prompts] == [8, 1, 20]
    assert {result.completions[0].stop for result in results.values()} == {"length"}
    assert generator.spent.context_limited == 2
    with pytest.raises(ValueError, match="prompt 3 has 48 tokens and the model's context is 48"):
        generator.generate(prompts_of((48,)), Sampling())


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (Sampling(num_samples=0), "num_samples is 0"),
        (Sampling(max_new_tokens=0), "max_new_tokens is 0"),
        (Sampling(temperature=-0.1), "temperature is -0.1"),
        (Sampling(temperature=float("nan")), "temperature is nan"),
        (Sampling(top_p=0.0), "top_p is 0.0"),
        (Sampling(top_p=1.1), "top_p is 1.1"),
    ],
)
def test_sampling_without_meaning_is_refused(
    sampling: Sampling, named: str, language_model: Build, spelled: Any
) -> None:
    with pytest.raises(ConfigError, match=f"sampling.{named}"):
        LocalGenerator(language_model("llama"), spelled).generate(prompts_of((3,)), sampling)


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ([Prompt(4, "", ())], "prompt 4 has no token ids"),
        ([Prompt(4, "", (3, 31))], r"prompt 4 has ids from 3 to 31; the model's vocabulary is 0..30"),
        ([Prompt(4, "", (3,)), Prompt(4, "", (5,))], "prompt 4 is given twice"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    prompts: list[Prompt], told: str, language_model: Build, spelled: Any
) -> None:
    with pytest.raises(ValueError, match=told):
        LocalGenerator(language_model("llama"), spelled).generate(prompts, Sampling())


def test_no_prompts_give_nothing(language_model: Build, spelled: Any) -> None:
    assert list(LocalGenerator(language_model("llama"), spelled).generate([], Sampling())) == []


def test_wrong_arguments_are_refused(language_model: Build, spelled: Any) -> None:
    model = language_model("llama")
    with pytest.raises(ConfigError, match="batch_rows is 0"):
        LocalGenerator(model, spelled, batch_rows=0)
    with pytest.raises(ConfigError, match="dtype is 'half'"):
        LocalGenerator(model, spelled, dtype="half")
    with pytest.raises(TypeError, match="Linear cannot generate"):
        LocalGenerator(nn.Linear(2, 2), spelled)
    spelled.eos_ids = ()
    with pytest.raises(ConfigError, match="no EOS token"):
        LocalGenerator(model, spelled)


def test_a_network_that_holds_the_model_is_unwrapped(language_model: Build) -> None:
    model = language_model("llama")
    holder = nn.Module()
    holder.model = model
    assert causal_language_model(holder) is model and causal_language_model(model) is model
