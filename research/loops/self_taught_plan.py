"""What a config says of a self-teaching loop."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SelfTaughtPlan:
    """Settings of ``loop=self_taught``; the loop itself is :class:`research.loops.self_taught.SelfTaught`.

    iterations, first_steps, growth, restart   see ``Schedule``
    num_anchors        gold chains in every training set beside its own solutions: the first of the data's problems
    num_problems       training problems that the student tries to solve in every iteration: the next ones
    hint_probability, hint_format    who of the failures is shown the answer, and how; see ``Hints``
    num_samples, sampling_temperature, top_p   how it writes; temperature 0 and one sample: greedily, as published
    max_new_tokens     length limit of a solution; null: the data's max_tokens
    """

    iterations: int = 8
    first_steps: int = 40
    growth: float = 1.2
    restart: bool = True
    num_problems: int = 2000
    num_anchors: int = 0
    hint_probability: float = 0.0
    hint_format: str | None = None
    num_samples: int = 1
    sampling_temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
