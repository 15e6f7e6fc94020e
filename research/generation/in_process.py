"""A language model of this process as a generator."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from research.errors import ConfigError
from research.generation.base import AbstractGenerator, Prompt, Written
from research.generation.cost import DecoderFlops, GenerationCost
from research.generation.decoding import Drawn, LiveBatch, decode
from research.generation.distribution import check_sampling
from research.models.modes import eval_mode, parameters_as
from research.models.weights import weights_sha256
from research.records import Completion, Sampling
from research.seeding import rng_for, seed_for
from research.text.codec import Codec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LocalGenerator(AbstractGenerator):
    """Samples from a causal language model of `transformers`.

    network     the model, or a network that holds one as ``.model``; its weights are read at every call, so that a
                student that is being trained is sampled as it is now
    tokenizer   has ``decode(ids) -> str``, and ``eos_ids`` and ``pad_id`` (a Codec) or ``eos_token_id`` and
                ``pad_token_id`` (a tokenizer) where the arguments of that name are None
    eos_ids     any of these ends a completion
    pad_id      fills the left of short prompts; it is masked out, so that it may be an EOS
    batch_rows  the most completions that grow together. It changes speed and memory; completions only by rounding.
                A prompt's samples are in one batch and the prompt is run once, so that a batch may have fewer rows,
                always more than half; where the samples of one prompt are more, it is run again in each batch that
                they reach, which is counted in ``spent``
    device      where to move the model; None: where it is
    dtype       float32, bfloat16 or float16: to round the weights to while a batch grows; None: as they are
    vocab_size  tokens that may be drawn: the rows of a padded head above them stand for none. None: those that the
                tokenizer has; all rows, where it does not tell

    Every completion draws from its own stream of (seed, prompt's index, sample number): neither the other prompts nor
    their order nor ``batch_rows`` change it, and a larger ``max_new_tokens`` only goes on where a smaller one stopped.
    Nothing of the model's `generation_config` is applied (penalties, top-k, forced tokens, its list of EOS).

    ``Completion.logprob`` is of the distribution that was drawn from, after temperature and top-p; at temperature 0,
    where that would be 0, it is of the model itself (temperature 1). Greedy samples of one prompt are all the same and
    computed once. A completion that reaches the model's context length stops there, "length", and is counted in
    ``spent.context_limited``.

    Between two results of :meth:`generate` the network is in the modes that it was given in, and gradients are as the
    caller has them.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        *,
        eos_ids: Iterable[int] | None = None,
        pad_id: int | None = None,
        batch_rows: int = 256,
        device: str | None = None,
        dtype: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if batch_rows < 1:
            raise ConfigError(f"generator.batch_rows is {batch_rows}; expected at least 1")
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"generator.dtype is {dtype!r}; expected null or one of {sorted(DTYPES)}")
        self._network = network if device is None else network.to(device)
        self._model = causal_language_model(network)
        self._decode_ids = tokenizer.decode
        self._eos_ids = frozenset(_eos_ids_of(tokenizer) if eos_ids is None else eos_ids)
        self._pad_id = _pad_id_of(tokenizer, self._eos_ids) if pad_id is None else pad_id
        self._batch_rows = batch_rows
        self._vocab_size = _vocab_size_of(tokenizer) if vocab_size is None else vocab_size
        self._dtype = None if dtype is None else DTYPES[dtype]
        self._flops = DecoderFlops.of(self._model)
        self._context = getattr(self._model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.longest_prompt = None if self._context is None else self._context - 1
        self.spent = GenerationCost()

    @property
    def identity(self) -> dict[str, Any]:  # type: ignore[override]  # weights may have been trained since the last look
        """Kind, architecture, size and hash of the weights as they are now."""
        return {
            "kind": "local",
            "architecture": type(self._model).__name__,
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "weights_sha256": weights_sha256(self._network),
            "dtype": str(self._dtype or next(self._model.parameters()).dtype).removeprefix("torch."),
            "eos_ids": sorted(self._eos_ids),
        }

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Written]:
        """Each prompt's completions once, longest prompts first.

        Raises ConfigError for a sampling without meaning, ValueError for prompts that cannot be continued: empty, with
        ids outside the vocabulary, as long as the model's context, or several with one index.
        """
        check_sampling(sampling)
        self._check(prompts)
        return self._generate(sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.index)), sampling)

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Written]:
        distinct = 1 if sampling.temperature == 0 else sampling.num_samples
        rows = [(prompt, sample) for prompt in prompts for sample in range(distinct)]
        whole = self._batch_rows // distinct * distinct or self._batch_rows  # rows of whole prompts, where one fits
        pending: list[Completion] = []  # of the prompt that the last batch broke off in
        for start in range(0, len(rows), whole):
            share = rows[start : start + whole]
            for (prompt, _), completion in zip(share, self._complete(share, sampling), strict=True):
                pending.append(completion)
                if len(pending) == distinct:
                    yield Written(prompt.index, tuple(pending) * (sampling.num_samples // distinct))
                    pending = []

    def _complete(self, rows: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Completion]:
        """One completion per (prompt, sample), in their order."""
        started = time.perf_counter()
        prompts = list(dict.fromkeys(prompt for prompt, _ in rows))
        place = {prompt: number for number, prompt in enumerate(prompts)}
        limits = [self._limit(prompt, sampling) for prompt, _ in rows]
        device = next(self._model.parameters()).device
        with eval_mode(self._network), parameters_as(self._model, self._dtype), torch.no_grad():
            ids = [prompt.ids for prompt in prompts]
            batch = LiveBatch(self._model, ids, self._pad_id, max(limits), device, self._vocab_size)
            _finish_work(device)
            prompt_seconds = time.perf_counter() - started
            uniform_BT = None if sampling.temperature == 0 else _uniforms(rows, sampling).to(device)
            drawn = decode(batch, [place[prompt] for prompt, _ in rows], limits, uniform_BT, sampling, self._eos_ids)
        completions = [self._completion(row) for row in drawn]
        self._account(rows, prompts, drawn, limits, sampling, time.perf_counter() - started, prompt_seconds)
        return completions

    def _completion(self, row: Drawn) -> Completion:
        ended = row.ids[-1] in self._eos_ids
        text = self._decode_ids(row.ids[:-1] if ended else row.ids)
        return Completion(tuple(row.ids), text, "eos" if ended else "length", sum(row.logprobs), tuple(row.logprobs))

    def _account(
        self,
        rows: Sequence[tuple[Prompt, int]],
        prompts: Sequence[Prompt],
        drawn: Sequence[Drawn],
        limits: Sequence[int],
        sampling: Sampling,
        seconds: float,
        prompt_seconds: float,
    ) -> None:
        prompt_flops = float(sum(self._flops.prompt(len(prompt.ids)) for prompt in prompts))
        flops = prompt_flops + sum(
            self._flops.completion(len(prompt.ids), len(row.ids)) for (prompt, _), row in zip(rows, drawn, strict=True)
        )
        cut = sum(
            limit < sampling.max_new_tokens and len(row.ids) == limit and row.ids[-1] not in self._eos_ids
            for row, limit in zip(drawn, limits, strict=True)
        )
        prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        tokens = sum(len(row.ids) for row in drawn)
        self.spent += GenerationCost(prompt_tokens, tokens, flops, seconds, cut, prompt_flops, prompt_seconds)

    def _limit(self, prompt: Prompt, sampling: Sampling) -> int:
        room = sampling.max_new_tokens if self._context is None else self._context - len(prompt.ids)
        return min(sampling.max_new_tokens, room)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        seen: set[int] = set()
        for prompt in prompts:
            where = f"prompt {prompt.index}"
            if prompt.index in seen:
                raise ValueError(
                    f"{where} is given twice; expected one prompt per index, which names its random stream"
                )
            seen.add(prompt.index)
            if not prompt.ids:
                raise ValueError(f"{where} has no token ids; expected at least one token to continue")
            if not 0 <= min(prompt.ids) <= max(prompt.ids) < vocabulary:
                raise ValueError(
                    f"{where} has ids from {min(prompt.ids)} to {max(prompt.ids)}; the model's vocabulary is "
                    f"0..{vocabulary - 1}: encode it with the model's own tokenizer"
                )
            if self._context is not None and len(prompt.ids) >= self._context:
                raise ValueError(
                    f"{where} has {len(prompt.ids)} tokens and the model's context is {self._context}: no room for a "
                    "completion; shorten the prompt, drop it, or use a model with a longer context"
                )


def causal_language_model(network: nn.Module) -> Any:
    """The `transformers` (or peft) model itself: ``network``, or what it holds as ``.model``.

    Raises TypeError for a network that cannot generate.
    """
    for candidate in (network, getattr(network, "model", None)):
        if callable(getattr(candidate, "prepare_inputs_for_generation", None)):
            return candidate
    raise TypeError(
        f"{type(network).__name__} cannot generate; expected a causal language model of transformers, or a network "
        "that holds one as .model"
    )


def _finish_work(device: torch.device) -> None:
    """Wait for a device that works behind the caller's back: a clock read now then times what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _uniforms(rows: Sequence[tuple[Prompt, int]], sampling: Sampling) -> Tensor:
    """Uniforms in [0, 1), float64 [rows, max_new_tokens]: one stream per (seed, prompt's index, sample)."""
    uniform_BT = torch.empty(len(rows), sampling.max_new_tokens, dtype=torch.float64)
    for uniform_T, (prompt, sample) in zip(uniform_BT, rows, strict=True):
        stream = rng_for(seed_for(sampling.seed, "completions", prompt.index), "sample", sample)
        uniform_T.copy_(torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=stream))
    return uniform_BT


def _eos_ids_of(tokenizer: Any) -> tuple[int, ...]:
    given = getattr(tokenizer, "eos_ids", None)
    if given is None:
        end = getattr(tokenizer, "eos_token_id", None)
        given = () if end is None else (end,)
    if not given:
        raise ConfigError(
            "the tokenizer has no EOS token, so that nothing would ever end before the length limit; "
            "set its eos_token, or give eos_ids"
        )
    return tuple(given)


def _vocab_size_of(tokenizer: Any) -> int | None:
    """Above the largest id; a tokenizer's own ``vocab_size`` leaves out the tokens that were added to it."""
    if isinstance(tokenizer, Codec):
        return tokenizer.vocab_size
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return max(vocabulary.values()) + 1 if vocabulary else None


def _pad_id_of(tokenizer: Any, eos_ids: frozenset[int]) -> int:
    for name in ("pad_id", "pad_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return min(eos_ids, default=0)
