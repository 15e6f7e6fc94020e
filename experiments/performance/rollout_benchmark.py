"""Rollouts of LocalGenerator against `model.generate`; called by traces_benchmark.py."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmark import composed
from measuring import LANGUAGE_MODEL, built, compared, in_turn, plain_steps

ADDITION = [*LANGUAGE_MODEL, "task=addition", "template=plain", "data.num_test=0"]
MAX_NEW_TOKENS = 96


def rollout(training: int, num_prompts: int, rounds: int) -> dict[str, Any]:
    """LocalGenerator against `model.generate` called directly: one batch of prompts, the same weights.

    The model has just learned additions of 1 to 5 digits in ``training`` steps, so that completions end at many
    different lengths.
    """
    from research.generation.base import Prompt
    from research.generation.in_process import LocalGenerator

    cfg = composed([*ADDITION, f"data.num_train={64 * training}", f"data.num_val={num_prompts}"])
    parts = built(cfg)
    codec, network = parts.data.codec, parts.method.student
    plain_steps(cfg, network, parts.data.train_dataloader(), training)
    problems = parts.data.problems("val")
    prompts = [Prompt(p.index, p.text, tuple(codec.prompt_ids(p.text))) for p in problems]
    generator = LocalGenerator(network, codec, batch_rows=len(prompts))
    return {
        name: rollout_ratio(generator, network.model.eval(), codec, prompts, temperature, rounds)
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }


def rollout_ratio(
    generator: Any, model: Any, codec: Any, prompts: Sequence[Any], temperature: float, rounds: int
) -> dict[str, Any]:
    from research.records import Sampling

    written: dict[str, dict[int, tuple[int, ...]]] = {}

    def ours() -> float:
        sampling = Sampling(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS)
        started = time.process_time()
        written["ours"] = {each.index: each.completions[0].ids for each in generator.generate(prompts, sampling)}
        return (time.process_time() - started) / sum(map(len, written["ours"].values()))

    def direct() -> float:
        started = time.process_time()
        written["direct"] = directly(model, codec, prompts, temperature)
        return (time.process_time() - started) / sum(map(len, written["direct"].values()))

    measured = in_turn({"ours": ours, "direct": direct}, rounds)
    lengths = sorted(map(len, written["ours"].values()))
    told: dict[str, Any] = {
        "prompts": len(prompts),
        "tokens": {"shortest": lengths[0], "median": statistics.median(lengths), "longest": lengths[-1]},
        "distinct_lengths": len(set(lengths)),
    }
    if temperature == 0:
        told["equal_completions"] = sum(written["ours"][p.index] == written["direct"][p.index] for p in prompts)
    return compared(measured["ours"], measured["direct"]) | told


def directly(model: Any, codec: Any, prompts: Sequence[Any], temperature: float) -> dict[int, tuple[int, ...]]:
    """One call of `model.generate` on prompts padded on the left; what follows an EOS is cut off."""
    import torch

    width = max(len(prompt.ids) for prompt in prompts)
    ids_BT = torch.tensor([[codec.pad_id] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in prompts])
    pads_B1 = torch.tensor([[width - len(prompt.ids)] for prompt in prompts])
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    output_BT = model.generate(
        ids_BT,
        attention_mask=(torch.arange(width) >= pads_B1).long(),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=temperature > 0,
        eos_token_id=list(codec.eos_ids),
        pad_token_id=codec.pad_id,
        **drawn,
    )
    written = {}
    for prompt, row in zip(prompts, output_BT[:, width:].tolist(), strict=True):
        end = next((place + 1 for place, token in enumerate(row) if token in codec.eos_ids), len(row))
        written[prompt.index] = tuple(row[:end])
    return written
