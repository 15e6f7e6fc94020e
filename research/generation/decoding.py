"""One batch of rows: its prompts through the library's pass, then token by token, by our own steps or through it."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from research.generation.distribution import draw
from research.generation.stepping import RotaryStepper
from research.models.rotary import is_plain
from research.records import Sampling


@dataclass
class Drawn:
    """One row as it grows: its token ids (EOS included) and the natural-log probability of each draw."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LiveBatch:
    """The rows that still grow: their cache and the logits of their next token.

    model     a causal language model of `transformers`, in eval mode
    prompts   token ids, one row each; unequal lengths are padded on the left, so that every row's last token stands in
              the last column, under an attention mask and with positions that start at the prompt's first token.
              Prompts of one length need no mask and get none
    capacity  most tokens that will be fed after the prompts
    vocab_size   tokens that may be drawn; the rows of the head above it are padding. None: all rows
    """

    logits_BV: Tensor

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        capacity: int,
        device: torch.device,
        vocab_size: int | None = None,
    ) -> None:
        from transformers import DynamicCache

        width = max(len(ids) for ids in prompts)
        ids_BT = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        pads_B = torch.tensor([width - len(ids) for ids in prompts], device=device)
        self._model, self._vocab_size, self._capacity = model, vocab_size, capacity
        self._cache: Any = DynamicCache(config=model.config)
        self._can_step = is_plain(model)
        self._stepper: RotaryStepper | None = None  # in the place of the cache, from the first token on
        self._visible_BT: Tensor | None = None
        if len({len(ids) for ids in prompts}) > 1:
            self._visible_BT = torch.arange(width + capacity, device=device) >= pads_B[:, None]
        position_BT = torch.arange(width, device=device) - pads_B[:, None]
        self._next_position_B = position_BT[:, -1] + 1
        self._run(ids_BT, position_BT.clamp(min=0))

    def feed(self, token_B: Tensor) -> None:
        """One more token of every row."""
        if self._can_step and self._stepper is None:
            self._stepper = RotaryStepper(self._model, self._cache, self._visible_BT, self._capacity)
            self._cache = None
        if self._stepper is not None:
            self.logits_BV = self._stepper.feed(token_B, self._next_position_B)[:, : self._vocab_size]
        else:
            self._run(token_B[:, None], self._next_position_B[:, None])
        self._next_position_B = self._next_position_B + 1

    def select(self, places: Sequence[int]) -> None:
        """Go on with these rows of the batch, in this order; a row may be left out or taken several times."""
        place_B = torch.tensor(places, device=self.logits_BV.device)
        self.logits_BV = self.logits_BV[place_B]
        self._next_position_B = self._next_position_B[place_B]
        if self._stepper is not None:
            self._stepper.select(place_B)
            return
        self._cache.batch_select_indices(place_B)
        if self._visible_BT is not None:
            self._visible_BT = self._visible_BT[place_B]

    def _run(self, ids_BT: Tensor, position_BT: Tensor) -> None:
        seen = self._cache.get_seq_length() + ids_BT.shape[1]
        output = self._model(
            input_ids=ids_BT,
            attention_mask=None if self._visible_BT is None else self._visible_BT[:, :seen],
            position_ids=position_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits_BV = output.logits[:, -1, : self._vocab_size]


@torch.no_grad()
def decode(
    batch: LiveBatch,
    prompt_of_row: Sequence[int],
    limits: Sequence[int],
    uniform_BT: Tensor | None,
    sampling: Sampling,
    eos_ids: Collection[int],
) -> list[Drawn]:
    """Draw one completion per row; a row that finishes leaves the batch.

    prompt_of_row  for each row its place in ``batch``: a prompt runs once, and its cache is copied to its rows
    limits         most tokens of each row, the EOS included
    uniform_BT     for each row the uniforms of its draws; None at temperature 0

    Raises ValueError where the logits hold NaN or +inf, or -inf alone.
    """
    drawn = [Drawn() for _ in prompt_of_row]
    live = list(range(len(drawn)))
    batch.select(prompt_of_row)
    for step in range(max(limits)):
        uniform_B = None if uniform_BT is None else uniform_BT[:, step]
        token_B, logprob_B = draw(batch.logits_BV, sampling.temperature, sampling.top_p, uniform_B)
        going = []
        for place, (row, token, logprob) in enumerate(zip(live, token_B.tolist(), logprob_B.tolist(), strict=True)):
            if not math.isfinite(logprob):
                raise ValueError(
                    f"the model's logits are not finite at generated token {step}; "
                    "look at its training loss and weights: nothing it writes has a meaning"
                )
            drawn[row].ids.append(token)
            drawn[row].logprobs.append(logprob)
            if token not in eos_ids and step + 1 < limits[row]:
                going.append(place)
        if not going:
            break
        if len(going) < len(live):
            batch.select(going)
            live, token_B = [live[place] for place in going], token_B[going]
            uniform_BT = None if uniform_BT is None else uniform_BT[going]
        batch.feed(token_B)
    return drawn
