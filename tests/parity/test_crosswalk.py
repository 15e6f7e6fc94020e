"""What other projects call beta, lambda, alpha, temperature and reduction, evaluated beside ours on the same numbers.

Each function named after a project is its formula, written here from reading its source or paper: torch alone, float64,
nothing shared with the package. `docs/losses.md` is the table of these tests.
"""

import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

from research.losses.divergences import forward_kl, jsd, normalised_jsd, reverse_kl
from research.losses.linear import linear_divergence
from research.losses.soft_target import soft_target
from research.losses.sparse import sparse_divergence
from research.losses.supervised import cross_entropy
from research.methods.on_policy import OnPolicy
from research.records import DenseLogits, HiddenProjection, LossSum
from research.teachers.top_k import keep_top_k

IGNORED = -100
PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


class Numbers:
    """Two sequences of seven tokens, of unequal completions, over eleven classes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(6)
        self.student = 2 * torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
        self.teacher = 2 * torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(11, (2, 7), generator=generator)
        self.labels[0, :2] = self.labels[1, :5] = IGNORED
        self.mask = self.labels != IGNORED

    def ours(self, divergence: str, temperature: float = 1.0, *, squared: bool = False, **weights: float) -> float:
        return self.sum(divergence, temperature, squared=squared, **weights).mean().item()

    def sum(self, divergence: str, temperature: float = 1.0, *, squared: bool = False, **weights: float) -> LossSum:
        options = {"temperature": temperature, "scale_by_temperature_squared": squared, "loss_mask_N": self.mask}
        return soft_target(self.student, DenseLogits(self.teacher), divergence=divergence, **options, **weights)

    def hard(self) -> float:
        return cross_entropy(self.student, self.labels, self.mask).mean().item()

    def entropy(self) -> float:
        """Mean entropy of the teacher over trained tokens: what a cross-entropy has more than a divergence."""
        logprobs = self.teacher.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)[self.mask].mean().item()


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return Numbers()


def same(value: Tensor | float, expected: float) -> bool:
    return float(value) == pytest.approx(expected, abs=1e-12)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL of logprobs, first against second, per token."""
    return (first.exp() * (first - second)).sum(-1)


# -- the paper of GKD (arXiv:2306.13649) ------------------------------------------------------------------------------


def gkd_paper(numbers: Numbers, beta: float) -> Tensor:
    """Equation 1 per token, first averaged over the tokens of a sequence, then over sequences (sections 2 and 3)."""
    p, q = numbers.teacher.softmax(-1), numbers.student.softmax(-1)
    m = beta * p + (1 - beta) * q
    per_token = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    sequences = [row[mask].mean() for row, mask in zip(per_token, numbers.mask, strict=True)]
    return torch.stack(sequences).mean()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gkd_paper_beta_and_reduction(numbers: Numbers, beta: float) -> None:
    sequences = []
    for student, teacher, mask in zip(numbers.student, numbers.teacher, numbers.mask, strict=True):
        options = {"divergence": "jsd", "teacher_mixture_weight": beta, "loss_mask_N": mask}
        sequences.append(soft_target(student, DenseLogits(teacher), **options).mean().item())
    assert same(gkd_paper(numbers, beta), sum(sequences) / 2)
    assert not same(gkd_paper(numbers, beta), numbers.ours("jsd", teacher_mixture_weight=beta))  # a mean over tokens
    assert not same(gkd_paper(numbers, beta), numbers.ours("jsd", teacher_mixture_weight=1 - beta)) or beta == 0.5


def test_gkd_paper_limits(numbers: Numbers) -> None:
    """Divided by beta, or 1 - beta, the ends are the KLs; undivided they are 0."""
    student, teacher = numbers.student[numbers.mask], numbers.teacher[numbers.mask]
    small = 1e-6
    for beta, limit in ((small, forward_kl(student, teacher)), (1 - small, reverse_kl(student, teacher))):
        per_token = jsd(student, teacher, teacher_mixture_weight=beta)
        assert float(per_token.max()) < 1e-4
        torch.testing.assert_close(per_token / small, limit, rtol=1e-3, atol=0)
        torch.testing.assert_close(normalised_jsd(student, teacher, teacher_mixture_weight=round(beta)), limit)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_gkd_lambda_is_the_share_of_steps_on_own_words(share: float) -> None:
    """TRL, ms-swift: `random() <= lmbda`; the paper draws u and compares. Ours is a coin of the block's number."""
    coin = SimpleNamespace(on_policy_fraction=share, _seed=0)
    draw = random.Random(0)
    ours = sum(OnPolicy.is_on_policy(coin, block) for block in range(400)) / 400  # type: ignore[arg-type]
    theirs = sum(draw.random() <= share for _ in range(400)) / 400
    spread = 4 * math.sqrt(share * (1 - share) / 400)
    assert abs(ours - share) <= spread and abs(theirs - share) <= spread


# -- TRL 1.16 ---------------------------------------------------------------------------------------------------------


def trl(numbers: Numbers, beta: float, temperature: float = 1.0, num_items: float | None = None) -> Tensor:
    """GKDTrainer.generalized_jsd_loss with batchmean: summed over classes and unmasked tokens, divided by those."""
    student, teacher = (logits.div(temperature).log_softmax(-1) for logits in (numbers.student, numbers.teacher))
    if beta == 0:
        per_token = kl(teacher, student)
    elif beta == 1:
        per_token = kl(student, teacher)
    else:
        mixture = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
        per_token = beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
    kept = per_token[numbers.mask]
    return kept.sum() / (len(kept) if num_items is None else num_items)


@pytest.mark.parametrize("temperature", [1.0, 0.9, 3.0])
def test_trl_beta_and_temperature(numbers: Numbers, temperature: float) -> None:
    assert same(trl(numbers, 0.0, temperature), numbers.ours("forward_kl", temperature))
    assert same(trl(numbers, 1.0, temperature), numbers.ours("reverse_kl", temperature))
    for beta in (0.1, 0.5, 0.7):
        assert same(trl(numbers, beta, temperature), numbers.ours("jsd", temperature, teacher_mixture_weight=beta))
    assert temperature == 1 or not same(
        trl(numbers, 0.0, temperature), numbers.ours("forward_kl", temperature, squared=True)
    )


def test_trl_divides_by_the_tokens_of_the_whole_step(numbers: Numbers) -> None:
    loss = numbers.sum("reverse_kl")
    assert int(loss.count) == 7 and same(trl(numbers, 1.0, num_items=50), loss.total.item() / 50)


# -- DistiLLM ---------------------------------------------------------------------------------------------------------


def distillm(numbers: Numbers, name: str, lam: float = 0.0) -> Tensor:
    """distillm/losses.py: mixtures of probabilities, teacher and student; mean over labelled tokens."""
    p, q = numbers.teacher.softmax(-1), numbers.student.softmax(-1)
    toward_student = (1 - lam) * p + lam * q
    per_token = {
        "forward_kl": -(p * q.log()).sum(-1),
        "reverse_kl": -(q * p.log() - q * q.log()).sum(-1),
        "js_distance": lam * (q * (q / toward_student).log()).sum(-1)
        + (1 - lam) * (p * (p / toward_student).log()).sum(-1),
        "tv_distance": 0.5 * (p - q).abs().sum(-1),
        "skewed_forward_kl": -(p * (lam * p + (1 - lam) * q).log()).sum(-1),
        "skewed_reverse_kl": -(q * toward_student.log() - q * q.log()).sum(-1),
    }[name]
    return (per_token * numbers.mask).sum() / numbers.mask.sum()


@pytest.mark.parametrize("skew_alpha", [0.1, 0.4])
def test_distillm_skew_alpha(numbers: Numbers, skew_alpha: float) -> None:
    """The forward one lacks the teacher's entropy: a cross-entropy, of the same gradient."""
    forward = numbers.ours("skewed_forward_kl", skew_weight=skew_alpha)
    assert same(distillm(numbers, "skewed_forward_kl", skew_alpha), forward + numbers.entropy())
    reverse = numbers.ours("skewed_reverse_kl", skew_weight=skew_alpha)
    assert same(distillm(numbers, "skewed_reverse_kl", skew_alpha), reverse)


@pytest.mark.parametrize("lam", [0.1, 0.9])
def test_distillm_lam_of_js_distance_is_the_students(numbers: Numbers, lam: float) -> None:
    assert same(distillm(numbers, "js_distance", lam), numbers.ours("jsd", teacher_mixture_weight=1 - lam))
    assert not same(distillm(numbers, "js_distance", lam), numbers.ours("jsd", teacher_mixture_weight=lam))


def test_distillm_kls_and_total_variation(numbers: Numbers) -> None:
    assert same(distillm(numbers, "forward_kl"), numbers.ours("forward_kl") + numbers.entropy())
    assert same(distillm(numbers, "reverse_kl"), numbers.ours("reverse_kl"))
    assert same(distillm(numbers, "tv_distance"), numbers.ours("total_variation"))


def test_kd_ratio_is_the_soft_weight(numbers: Numbers) -> None:
    """DistiLLM, KDFlow, torchtune: (1 - kd_ratio) cross-entropy + kd_ratio distillation, both means over tokens."""
    ratio, hard = 0.3, torch_cross_entropy(numbers.student.flatten(0, 1), numbers.labels.flatten())
    theirs = (1 - ratio) * hard + ratio * distillm(numbers, "reverse_kl")
    assert same(theirs, 0.7 * numbers.hard() + 0.3 * numbers.ours("reverse_kl"))


# -- KDFlow -----------------------------------------------------------------------------------------------------------


def kdflow(numbers: Numbers, name: str, temperature: float, weight: float = 0.0) -> Tensor:
    """kdflow/loss: jsd_beta stands with the student; a token's sum over classes, averaged over tokens."""
    q, p = (logits.div(temperature).log_softmax(-1) for logits in (numbers.student, numbers.teacher))
    if name == "jsd":
        mixture = torch.logaddexp(q + math.log(weight), p + math.log(1 - weight))
        per_token = weight * kl(q, mixture) + (1 - weight) * kl(p, mixture)
    elif name == "skl":
        per_token = kl(p, torch.logaddexp(p + math.log(weight), q + math.log(1 - weight)))
    elif name == "srkl":
        per_token = kl(q, torch.logaddexp(q + math.log(weight), p + math.log(1 - weight)))
    else:
        per_token = {"kl": kl(p, q), "rkl": kl(q, p), "tvd": (p.exp() - q.exp()).abs().sum(-1) / 2}[name]
    return per_token[numbers.mask].sum() / numbers.mask.sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kdflow_losses(numbers: Numbers, temperature: float) -> None:
    for theirs, ours in (("kl", "forward_kl"), ("rkl", "reverse_kl"), ("tvd", "total_variation")):
        assert same(kdflow(numbers, theirs, temperature), numbers.ours(ours, temperature))
    for theirs, ours in (("skl", "skewed_forward_kl"), ("srkl", "skewed_reverse_kl")):
        assert same(kdflow(numbers, theirs, temperature, 0.1), numbers.ours(ours, temperature, skew_weight=0.1))


@pytest.mark.parametrize("jsd_beta", [0.2, 0.9])
def test_p05_kdflow_jsd_beta_is_the_students(numbers: Numbers, jsd_beta: float) -> None:
    theirs = kdflow(numbers, "jsd", 1.0, jsd_beta)
    assert same(theirs, numbers.ours("jsd", teacher_mixture_weight=1 - jsd_beta))
    assert not same(theirs, numbers.ours("jsd", teacher_mixture_weight=jsd_beta))


def test_p18_kdflow_cuts_both_heads_to_the_narrower(numbers: Numbers) -> None:
    hidden, head, wider = numbers.student[..., :5], numbers.student[0, :, :5], numbers.teacher[0, :, :5]
    wide_head = torch.cat([head, wider, wider])  # 21 rows against 14
    teacher_head = torch.cat([wider, head])
    narrow = SimpleNamespace(
        student=(hidden @ wide_head.T)[..., :14], teacher=numbers.teacher[..., :5] @ teacher_head.T, mask=numbers.mask
    )
    ours = linear_divergence(
        HiddenProjection(hidden, wide_head),
        HiddenProjection(numbers.teacher[..., :5], teacher_head),
        num_classes=14,
        loss_mask_N=numbers.mask,
    )
    assert same(kdflow(narrow, "kl", 1.0), ours.mean().item())  # type: ignore[arg-type]


# -- ms-swift ---------------------------------------------------------------------------------------------------------


def test_swift_beta_and_temperature(numbers: Numbers) -> None:
    """gkd_loss.py: TRL's divergence at a temperature that also samples, no factor of its square, mean over tokens."""

    def swift(beta: float, temperature: float) -> float:
        student, teacher = numbers.student[numbers.mask] / temperature, numbers.teacher[numbers.mask] / temperature
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(student), 3):
            s, t = student[start : start + 3].log_softmax(-1), teacher[start : start + 3].log_softmax(-1)
            m = torch.logsumexp(torch.stack([s + math.log1p(-beta), t + math.log(beta)]), dim=0)
            total = total + (beta * kl(t, m) + (1 - beta) * kl(s, m)).sum()
        return float(total) / len(student)

    for temperature in (1.0, 0.7):
        assert same(swift(0.3, temperature), numbers.ours("jsd", temperature, teacher_mixture_weight=0.3))


def test_swift_sft_alpha_is_a_hard_weight_beside_a_soft_weight_of_one(numbers: Numbers) -> None:
    hard = torch_cross_entropy(numbers.student.flatten(0, 1), numbers.labels.flatten())
    assert same(trl(numbers, 0.0) + 0.4 * hard, 1.0 * numbers.ours("forward_kl") + 0.4 * numbers.hard())


def test_p21_swift_logits_topk_has_no_counterpart(numbers: Numbers) -> None:
    """Both sides renormalised over the teacher's best: 0 for a student elsewhere. Ours keeps the mass of the rest."""
    teacher = numbers.teacher[numbers.mask]
    signal = keep_top_k(DenseLogits(teacher), 3)
    elsewhere = teacher.scatter_add(-1, signal.ids_NK, torch.full_like(signal.ids_NK, -9, dtype=torch.float64))
    theirs = kl(signal.logprobs_NK.double().log_softmax(-1), elsewhere.gather(-1, signal.ids_NK).log_softmax(-1))
    assert float(theirs.abs().max()) < 1e-6
    assert float(sparse_divergence("forward_kl", elsewhere, signal).min()) > 1


# -- torchtune --------------------------------------------------------------------------------------------------------


def torchtune(numbers: Numbers, sym_kd_ratio: float) -> Tensor:
    """SymmetricKLLoss: ratio x ForwardKLLoss (a cross-entropy) + (1 - ratio) x ReverseKLLoss; mean over tokens."""
    p, q = numbers.teacher.softmax(-1), numbers.student.log_softmax(-1)
    forward = -(p * q).sum(-1)
    reverse = -(q.exp() * numbers.teacher.log_softmax(-1) - q.exp() * q).sum(-1)
    per_token = sym_kd_ratio * forward + (1 - sym_kd_ratio) * reverse
    return (per_token * numbers.mask).sum() / numbers.mask.sum()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_torchtune_forward_reverse_and_symmetric(numbers: Numbers, ratio: float) -> None:
    forward, reverse = numbers.ours("forward_kl"), numbers.ours("reverse_kl")
    assert same(torchtune(numbers, ratio), ratio * (forward + numbers.entropy()) + (1 - ratio) * reverse)


@pytest.mark.parametrize("project", ["torchtune", "distillm"])
def test_p04_a_forward_kl_without_the_entropy_is_not_zero_at_equality(numbers: Numbers, project: str) -> None:
    agreed = Numbers()
    agreed.student = agreed.teacher
    theirs = torchtune(agreed, 1.0) if project == "torchtune" else distillm(agreed, "forward_kl")
    assert agreed.ours("forward_kl") == 0 and same(theirs, agreed.entropy()) and float(theirs) > 0.5


def test_torchtune_s_forward_kl_has_our_gradient(numbers: Numbers) -> None:
    leaf = numbers.student.clone().requires_grad_()
    moved = Numbers()
    moved.student = leaf
    theirs = torch.autograd.grad(torchtune(moved, 1.0), leaf)[0]
    ours = torch.autograd.grad(moved.sum("forward_kl").mean(), leaf)[0]
    torch.testing.assert_close(theirs, ours, atol=1e-14, rtol=0)


# -- torchdistill -----------------------------------------------------------------------------------------------------


def torchdistill(numbers: Numbers, temperature: float, alpha: float | None, beta: float | None = None) -> Tensor:
    """KDLoss on rows of a classifier: alpha CE + beta T^2 KL, but for alpha None or 0: the bare KL, without T^2."""
    student, teacher = numbers.student[:, 6], numbers.teacher[:, 6]
    soft = kl((teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)).sum() / len(student)
    if not alpha:
        return soft
    share = 1 - alpha if beta is None else beta
    return alpha * torch_cross_entropy(student, numbers.labels[:, 6]) + share * temperature**2 * soft


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_torchdistill_alpha_beta_and_the_square_it_drops(numbers: Numbers, temperature: float) -> None:
    student, signal, labels = numbers.student[:, 6], DenseLogits(numbers.teacher[:, 6]), numbers.labels[:, 6]
    hard = cross_entropy(student, labels).mean().item()
    soft = soft_target(student, signal, temperature=temperature).mean().item()
    assert same(torchdistill(numbers, temperature, 0.3), 0.3 * hard + 0.7 * soft)
    assert same(torchdistill(numbers, temperature, 0.3, 2.0), 0.3 * hard + 2.0 * soft)
    bare = soft_target(student, signal, temperature=temperature, scale_by_temperature_squared=False)
    for alpha in (None, 0.0):
        assert same(torchdistill(numbers, temperature, alpha), bare.mean().item())
    jump = float(torchdistill(numbers, temperature, 1e-9)) / float(torchdistill(numbers, temperature, 0.0))
    assert jump == pytest.approx(temperature**2, rel=1e-6)


# -- the page ---------------------------------------------------------------------------------------------------------


def test_every_line_of_the_page_names_a_test_and_every_test_stands_on_it() -> None:
    text = PAGE.read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    lines = [line for line in table if not re.match(r"\|\s*(-|theirs)", line)]
    named = [re.findall(r"`(test_\w+)`", line) for line in lines]
    assert len(lines) > 20 and all(len(tests) == 1 for tests in named), [
        line for line, tests in zip(lines, named, strict=True) if len(tests) != 1
    ]
    defined = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), flags=re.MULTILINE))
    here = "test_every_line_of_the_page_names_a_test_and_every_test_stands_on_it"
    assert {test for tests in named for test in tests} == defined - {here}
