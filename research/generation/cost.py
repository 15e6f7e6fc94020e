"""What generation cost, for the ledger."""

from dataclasses import dataclass, fields
from typing import Any

from torch import nn


@dataclass(frozen=True)
class GenerationCost:
    """Work done by a generator, summed over its calls; ``after - before`` is one call's.

    prompt_tokens    tokens of the prompts, each as often as it is run: once however many samples follow it, but by a
                     generator in this process again in each batch where its samples are more than ``batch_rows``
    tokens           generated tokens, EOS included
    flops            of everything, the pass over the prompts included: estimate by :class:`DecoderFlops`, padding not
                     counted; None where the model is not known
    seconds          wall-clock time of the generator's own work, without what the caller does between two results
    context_limited  completions that ended at the model's context length before ``max_new_tokens``
    prompt_flops     of ``flops``, those of the pass over the prompts (prefill), which gives the first token's logits
    prompt_seconds   of ``seconds``, those of that pass; None where it is not measured apart
    """

    prompt_tokens: int = 0
    tokens: int = 0
    flops: float | None = 0.0
    seconds: float = 0.0
    context_limited: int = 0
    prompt_flops: float | None = 0.0
    prompt_seconds: float | None = 0.0

    def __add__(self, other: "GenerationCost") -> "GenerationCost":
        """The sum; what is not known of either stays unknown."""
        return self._combined(other, 1)

    def __sub__(self, other: "GenerationCost") -> "GenerationCost":
        return self._combined(other, -1)

    def _combined(self, other: "GenerationCost", sign: int) -> "GenerationCost":
        found: dict[str, Any] = {}
        for item in fields(self):
            mine, its = getattr(self, item.name), getattr(other, item.name)
            found[item.name] = None if mine is None or its is None else mine + sign * its
        return GenerationCost(**found)

    def prefill(self) -> dict[str, float | None]:
        """The ledger's line of the prompts' passes: flops, tokens, seconds."""
        return {"flops": self.prompt_flops, "tokens": float(self.prompt_tokens), "seconds": self.prompt_seconds}

    def rollout(self) -> dict[str, float | None]:
        """The ledger's line of the generated tokens, everything but the prompts' passes: flops, tokens, seconds."""
        return {
            "flops": _less(self.flops, self.prompt_flops),
            "tokens": float(self.tokens),
            "seconds": _less(self.seconds, self.prompt_seconds),
        }


def _less(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else whole - part


@dataclass(frozen=True)
class DecoderFlops:
    """FLOPs of a decoder-only transformer's forward pass; a multiply-add counts two.

    body        weights of the matrices that every token meets, without embeddings and output head: 2 FLOPs each
    head        weights of the output head, met once per drawn token: 2 FLOPs each
    attention   ``4 * layers * heads * head_dim``: FLOPs per token and per place it attends to, itself included

    Biases, norms, activations and softmax are left out, as in the usual ``2 N`` per token.
    """

    body: int
    head: int
    attention: int

    @classmethod
    def of(cls, model: Any) -> "DecoderFlops":
        """Read from a `transformers` model: its parameters (a tied head counts as a head) and its config."""
        embedded = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        output = model.get_output_embeddings()
        head = (
            0 if output is None else sum(parameter.numel() for parameter in output.parameters() if parameter.ndim > 1)
        )
        heads = set() if output is None else {id(parameter) for parameter in output.parameters()}
        body = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in embedded | heads)
        config = model.config.get_text_config(decoder=True)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(body, head, 4 * config.num_hidden_layers * config.num_attention_heads * head_dim)

    def prompt(self, length: int) -> float:
        """One pass over a prompt, with logits at its last token alone."""
        return 2.0 * (self.body * length + self.head) + self.attention * length * (length + 1) / 2

    def completion(self, prompt_length: int, tokens: int) -> float:
        """What follows the prompt's pass until ``tokens`` are drawn; the last one is never fed back."""
        fed = tokens - 1
        places = fed * prompt_length + fed * (fed + 1) / 2
        return 2.0 * (self.body + self.head) * fed + self.attention * places
