"""Teacher-forced loss of a language model: how well it predicts given text, every token after the true ones before."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from research.metrics.classification import negative_log_likelihood
from research.metrics.sequences import token_right
from research.models.modes import eval_mode
from research.records import PAD_SEGMENT, TokenBatch

# The frozen surface. What each name means stands in the docstring of :func:`evaluate_tokens`.
TOKEN_METRIC_NAMES = (
    "loss", "nll", "perplexity", "token_accuracy", "completion_tokens", "prompt_nll", "prompt_tokens",
)  # fmt: skip
_CHUNK_TOKENS = 4096  # positions per float64 temporary of the size of the vocabulary


@dataclass(frozen=True)
class TokenEvaluation:
    """Teacher-forced numbers on one split.

    metrics      ``split/name`` -> value, names of TOKEN_METRIC_NAMES
    documents    one row per document, in the order they came: index, nll (nats, summed over its completion), tokens,
                 right_tokens of its completion
    omitted      ``split/name`` -> why that metric does not exist here
    """

    split: str
    metrics: dict[str, float]
    documents: dict[str, np.ndarray]
    omitted: dict[str, str] = field(default_factory=dict)


class _Sums:
    """Float64 sums over graded positions, batch after batch."""

    def __init__(self) -> None:
        self.weighted_nll = self.weight = self.prompt_nll = 0.0
        self.prompt_tokens = 0
        self.columns: dict[str, list[np.ndarray]] = {"index": [], "nll": [], "tokens": [], "right_tokens": []}


def evaluate_tokens(
    network: nn.Module, batches: Iterable[TokenBatch], *, split: str, device: torch.device | str | None = None
) -> TokenEvaluation:
    """Next-token metrics of ``network`` over ``batches``, in eval mode without gradient; sums in float64.

    nll                  mean over completion tokens, EOS included, of ``-log p(token | everything before it)``, nats
    perplexity           exp(nll), per token: not comparable between tokenizers; +inf where it overflows
    token_accuracy       share of completion tokens that are the most likely one
    completion_tokens    number of them
    prompt_nll, prompt_tokens    the same mean over the prompts' own tokens after their first, whatever weight they have
                         in training, and their number
    loss                 ``sum(weight * nll) / sum(weight)`` with the batches' own weights: the training loss of these
                         batches as one step, without dropout

    Every mean is over all tokens of all batches, not of means over batches. Positions of weight 0 that are neither
    completion nor prompt (padding, the last token of a document) add to nothing, whatever the logits hold there.

    Modes of submodules are restored; batches go to ``device``, or to where the network's parameters are. Raises
    ValueError where there is no batch, no completion token, or a logit at a graded position is NaN or +inf.
    """
    if not split or "/" in split:
        raise ValueError(f"split={split!r}: expected a name without '/', which separates split and metric")
    if device is not None:
        network.to(device)
    parameter = next(network.parameters(), None)
    target = device if device is not None else (None if parameter is None else parameter.device)
    sums = _Sums()
    with torch.no_grad(), eval_mode(network):
        for batch in batches:
            batch = batch if target is None else batch.to(target)
            _add_batch(sums, network(*batch.network_inputs()), batch)
    if not sums.columns["index"]:
        raise ValueError("no batch came; expected at least one document to evaluate")
    documents = {name: np.concatenate(parts) for name, parts in sums.columns.items()}
    return _finished(split, sums, documents)


def predicting(batch: TokenBatch) -> Tensor:
    """Where a token of the same document follows, bool [B, T]: the places whose label means something."""
    follows_BT = torch.zeros_like(batch.completion_BT)
    segment_BT = batch.segment_BT
    follows_BT[:, :-1] = (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, :-1] != PAD_SEGMENT)
    return follows_BT


def _add_batch(sums: _Sums, logits_BTV: Tensor, batch: TokenBatch) -> None:
    if logits_BTV.ndim != 3 or logits_BTV.shape[:2] != batch.ids_BT.shape:
        expected = (*batch.ids_BT.shape, "V")
        raise ValueError(f"the network returned shape {tuple(logits_BTV.shape)}; expected logits {expected}")
    graded_BT = batch.completion_BT | predicting(batch) | (batch.weight_BT != 0)
    nll_N, right_N = _graded(logits_BTV[graded_BT], batch.label_BT[graded_BT], batch)
    completion_N, weight_N = batch.completion_BT[graded_BT].cpu(), batch.weight_BT[graded_BT].cpu().double()
    sums.weighted_nll += float((weight_N * nll_N)[weight_N > 0].sum())  # 0 * inf would be NaN
    sums.weight += float(weight_N.sum())
    prompt_N = predicting(batch)[graded_BT].cpu() & ~completion_N
    sums.prompt_nll += float(nll_N[prompt_N].sum())
    sums.prompt_tokens += int(prompt_N.sum())
    document_N = _document_number(batch)[graded_BT].cpu()[completion_N]
    count = len(batch)
    sums.columns["index"].append(batch.index_D.cpu().numpy())
    sums.columns["nll"].append(torch.bincount(document_N, nll_N[completion_N], minlength=count).numpy())
    sums.columns["tokens"].append(torch.bincount(document_N, minlength=count).numpy())
    sums.columns["right_tokens"].append(torch.bincount(document_N[right_N[completion_N]], minlength=count).numpy())


def _graded(logits_NV: Tensor, label_N: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in float64 and rightness of each graded position, on the CPU, chunk by chunk."""
    broken_N = (logits_NV.isnan() | logits_NV.isposinf()).any(dim=-1)  # -inf: a token that is excluded
    if bool(broken_N.any()):
        raise ValueError(
            f"the logits hold NaN or +inf at {int(broken_N.sum())} of {len(broken_N)} graded positions of the "
            f"documents {batch.index_D.tolist()[:10]}: look at the training loss and the weights"
        )
    chunks = list(zip(logits_NV.split(_CHUNK_TOKENS), label_N.split(_CHUNK_TOKENS), strict=True))
    nll_N = torch.cat([negative_log_likelihood(rows_NV, labels_N) for rows_NV, labels_N in chunks])
    right_N = torch.cat([token_right(rows_NV, labels_N) for rows_NV, labels_N in chunks])
    return nll_N.cpu(), right_N.cpu()


def _document_number(batch: TokenBatch) -> Tensor:
    """The place in ``index_D`` of the document at each position, int64 [B, T]; no meaning on padding."""
    last_B = batch.segment_BT.max(dim=1).values
    before_B = last_B.cumsum(0) - last_B
    if int(last_B.sum()) != len(batch):
        raise ValueError(f"the rows hold {int(last_B.sum())} documents, index_D has {len(batch)}: expected one id each")
    return before_B[:, None] + batch.segment_BT - 1


def _finished(split: str, sums: _Sums, documents: dict[str, np.ndarray]) -> TokenEvaluation:
    tokens = int(documents["tokens"].sum())
    if tokens == 0:
        raise ValueError("no completion token in any batch; expected documents with a completion")
    nll = float(documents["nll"].sum()) / tokens
    metrics = {
        "nll": nll,
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "token_accuracy": float(documents["right_tokens"].sum()) / tokens,
        "completion_tokens": float(tokens),
        "prompt_tokens": float(sums.prompt_tokens),
    }
    omitted = {}
    if sums.weight > 0:
        metrics["loss"] = sums.weighted_nll / sums.weight
    else:
        omitted["loss"] = "every weight is 0: nothing here is trained on"
    if sums.prompt_tokens > 0:
        metrics["prompt_nll"] = sums.prompt_nll / sums.prompt_tokens
    else:
        omitted["prompt_nll"] = "no prompt has a token after its first"
    named = {f"{split}/{name}": metrics[name] for name in TOKEN_METRIC_NAMES if name in metrics}
    return TokenEvaluation(split, named, documents, {f"{split}/{name}": why for name, why in omitted.items()})
