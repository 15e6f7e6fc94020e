"""Every shipped method config, built as a run builds it, and called on distributions whose loss is known by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from research.config import make
from research.errors import ConfigError
from research.losses.divergences import DIVERGENCES
from research.methods.base import AbstractMethod
from research.methods.soft_target import LogitMatching, SoftTarget
from research.methods.supervised import Supervised
from research.records import ClassBatch, DenseLogits, TopKLogprobs
from research.teachers.base import AbstractTeacher, TeacherIdentity

TEACHER, STUDENT = (0.7, 0.2, 0.1), (0.2, 0.3, 0.5)
LABEL = 0


class Says(AbstractTeacher):
    """The teacher's three probabilities for every row, as dense logits (with a constant added) or as its top class."""

    num_classes = 3
    identity = TeacherIdentity("frozen", "0" * 64, "says", {})

    def __init__(self, top_k: int | None = None) -> None:
        self.top_k = top_k

    def signal(self, batch: ClassBatch) -> DenseLogits | TopKLogprobs:
        logprobs_NV = torch.tensor(TEACHER).log().repeat(len(batch), 1)
        if self.top_k is None:
            return DenseLogits(logprobs_NV + 3.0)
        tail_N = torch.tensor(sum(TEACHER[self.top_k :])).log().repeat(len(batch))
        return TopKLogprobs(torch.zeros(len(batch), 1, dtype=torch.long), logprobs_NV[:, :1], tail_N, 3)


class Answers(nn.Module):
    """The student's three probabilities for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.logits_V = nn.Parameter(torch.tensor(STUDENT).log() - 1.0)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits_V.repeat(len(inputs), 1)


def batch(rows: int = 2) -> ClassBatch:
    return ClassBatch(torch.zeros(rows, 4), torch.full((rows,), LABEL), torch.arange(rows), rows)


def weighted(method: AbstractMethod) -> float:
    return float(sum(part.weight * part.loss.mean().detach() for part in method.components(batch())))


def softened(probs: tuple[float, ...], temperature: float) -> list[float]:
    powers = [p ** (1 / temperature) for p in probs]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def half_squares_of_centred_logits() -> float:
    logs = [[math.log(p) for p in probs] for probs in (STUDENT, TEACHER)]
    (z, v), means = logs, [sum(row) / 3 for row in logs]
    return sum(((z_i - means[0]) - (v_i - means[1])) ** 2 for z_i, v_i in zip(z, v, strict=True)) / 6


# What the shipped config of each method gives on this pair, from its formula.
EXPECTED: dict[str, Callable[[dict], float]] = {
    "supervised": lambda config: -math.log(STUDENT[LABEL]),
    "soft_target": lambda config: (
        config["temperature"] ** 2
        * kl(softened(TEACHER, config["temperature"]), softened(STUDENT, config["temperature"]))
    ),
    "logit_matching": lambda config: half_squares_of_centred_logits(),
}
# The table of the correctness catalogue: KL both ways, and the JSD by the teacher's share of the mixture.
BY_DIVERGENCE = [
    ("forward_kl", {}, 0.634897),
    ("reverse_kl", {}, 0.675806),
    ("jsd", {"teacher_mixture_weight": 0.5}, 0.151358),
    ("jsd", {"teacher_mixture_weight": 0.3}, 0.127337),
    ("jsd", {"teacher_mixture_weight": 0.7}, 0.129775),
    ("normalised_jsd", {"teacher_mixture_weight": 0.0}, 0.634897),
    ("normalised_jsd", {"teacher_mixture_weight": 1.0}, 0.675806),
    ("normalised_jsd", {"teacher_mixture_weight": 0.5}, 0.151358 / 0.25),
    ("skewed_forward_kl", {"skew_weight": 0.0}, 0.634897),
    ("skewed_reverse_kl", {"skew_weight": 0.0}, 0.675806),
    ("total_variation", {}, 0.5),
]


@pytest.fixture
def built(kit: SimpleNamespace, repository: Path) -> Callable[..., tuple[AbstractMethod, dict]]:
    def build(name: str, **changes: Any) -> tuple[AbstractMethod, dict]:
        config = {**OmegaConf.to_container(OmegaConf.load(repository / "conf/method" / f"{name}.yaml")), **changes}
        return make(config, "method", training=kit.make_training(Answers()), teacher=Says()), config

    return build


def test_p02_every_shipped_method_gives_its_formula_s_value(built: Callable, repository: Path) -> None:
    shipped = {path.stem for path in (repository / "conf/method").rglob("*.yaml")}
    of_text = {"sft_trace", "on_policy", "policy_gradient"}  # their values stand in the test modules of their names
    assert shipped == {*EXPECTED, *of_text}  # a new config comes with its value
    for name in EXPECTED:
        method, config = built(name)
        assert weighted(method) == pytest.approx(EXPECTED[name](config), abs=1e-6)


@pytest.mark.parametrize(("name", "weights", "expected"), BY_DIVERGENCE)
def test_p02_the_recorded_name_of_the_divergence_is_what_is_computed(
    built: Callable, name: str, weights: dict, expected: float
) -> None:
    method, config = built("soft_target", divergence=name, temperature=1.0, **weights)
    assert config["divergence"] == name
    assert weighted(method) == pytest.approx(expected, abs=1e-6 if name != "normalised_jsd" else 4e-6)


def test_every_divergence_can_be_chosen() -> None:
    assert {name for name, _, _ in BY_DIVERGENCE} == set(DIVERGENCES)


def test_p12_the_shipped_config_scales_by_temperature_squared_and_says_so(built: Callable) -> None:
    method, config = built("soft_target")
    assert config["scale_by_temperature_squared"] is True
    plain, _ = built("soft_target", scale_by_temperature_squared=False)
    assert weighted(method) == pytest.approx(config["temperature"] ** 2 * weighted(plain), rel=1e-6)


def test_hard_and_soft_add_with_their_weights(built: Callable) -> None:
    method, _ = built("soft_target", temperature=1.0, hard_weight=0.25, soft_weight=2.0)
    assert weighted(method) == pytest.approx(2.0 * 0.634897 - 0.25 * math.log(STUDENT[LABEL]), abs=1e-5)
    assert [part.name for part in method.components(batch())] == ["soft", "hard"]


def test_label_smoothing_spreads_over_all_classes(built: Callable) -> None:
    method, _ = built("supervised", label_smoothing=0.3)
    targets = [0.7 + 0.1, 0.1, 0.1]
    expected = -sum(t * math.log(q) for t, q in zip(targets, STUDENT, strict=True))
    assert weighted(method) == pytest.approx(expected, abs=1e-6)


def test_a_top_k_teacher_teaches_by_its_buckets(kit: SimpleNamespace) -> None:
    method = SoftTarget(kit.make_training(Answers()), Says(top_k=1), temperature=1.0)
    assert weighted(method) == pytest.approx(kl([0.7, 0.3], [0.2, 0.8]), abs=1e-6)
    with pytest.raises(ConfigError, match="needs every class's logit, the teacher gives TopKLogprobs"):
        LogitMatching(kit.make_training(Answers()), Says(top_k=1)).components(batch())


@pytest.mark.parametrize("made", [SoftTarget, LogitMatching])
def test_a_teacher_without_weight_is_not_asked(kit: SimpleNamespace, made: Any) -> None:
    class Silent(Says):
        def signal(self, batch: ClassBatch) -> DenseLogits:
            raise RuntimeError("asked")

    method = made(kit.make_training(Answers()), Silent(), hard_weight=1.0, soft_weight=0.0)
    assert weighted(method) == pytest.approx(-math.log(STUDENT[LABEL]), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0}, r"method\.temperature is 0\.0"),
        ({"temperature": -1.0}, r"method\.temperature is -1\.0"),
        ({"temperature": math.inf}, r"method\.temperature is inf"),
        ({"temperature": math.nan}, r"method\.temperature is nan"),
        ({"hard_weight": -0.1}, r"method\.hard_weight is -0\.1"),
        ({"soft_weight": math.nan}, r"method\.soft_weight is nan"),
        ({"soft_weight": math.inf}, r"method\.soft_weight is inf"),
        ({"hard_weight": 0.0, "soft_weight": 0.0}, "both 0"),
        ({"divergence": "forward_k"}, "did you mean 'forward_kl'"),
        ({"divergence": "jsd"}, "needs teacher_mixture_weight"),
        ({"divergence": "jsd", "teacher_mixture_weight": 1.0}, "teacher_mixture_weight"),
        ({"divergence": "jsd", "teacher_mixture_weight": 2.0}, "teacher_mixture_weight"),
        ({"divergence": "forward_kl", "skew_weight": 0.5}, "takes no weight"),
        ({"divergence": "skewed_forward_kl", "skew_weight": 1.0}, "skew_weight"),
    ],
)
def test_bad_options_are_refused_before_the_first_step(kit: SimpleNamespace, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SoftTarget(kit.make_training(), kit.make_teacher(), **options)
    shared = {key: value for key, value in options.items() if key.endswith("t_weight") or key == "hard_weight"}
    if shared and "skew_weight" not in shared:
        with pytest.raises(ConfigError, match=named):
            LogitMatching(kit.make_training(), kit.make_teacher(), **shared)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_a_bad_label_smoothing_is_refused(kit: SimpleNamespace, smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"method\.label_smoothing is"):
        Supervised(kit.make_training(), label_smoothing=smoothing)


@pytest.mark.parametrize("made", [SoftTarget, LogitMatching])
def test_a_method_that_needs_a_teacher_says_so(kit: SimpleNamespace, made: Any) -> None:
    with pytest.raises(ConfigError, match=f"the method {made.__name__} needs a teacher.* or teacher=cached"):
        made(kit.make_training())
    with pytest.raises(ConfigError, match="the method Supervised has no teacher"):
        Supervised(kit.make_training()).teacher_signal(batch())
