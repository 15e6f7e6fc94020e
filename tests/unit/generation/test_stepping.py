"""Steps of the rows' own decoder against whole passes of the library's, without cache, batch or padding."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import Qwen2Config, Qwen2ForCausalLM

from research.generation.base import Prompt
from research.generation.decoding import LiveBatch
from research.generation.in_process import LocalGenerator
from research.generation.stepping import RotaryStepper
from research.models.rotary import is_plain
from research.records import Sampling

Build = Callable[..., Any]
CPU = torch.device("cpu")
RAGGED = (2, 9, 5, 1)
LONG = {"max_position_embeddings": 256}
ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10_000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0},
}


def qwen2() -> Any:
    """With biases of queries, keys and values that are not 0, and two query heads to a key head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=31, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **sizes, **LONG)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def rows_of(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 31, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def whole_pass(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits behind each row, alone, in one pass."""
    return torch.stack([model(torch.tensor([list(row)])).logits[0, -1] for row in rows])


@torch.no_grad()
def compare(model: Any, lengths: Sequence[int] = RAGGED, tokens: int = 75, close: float = 2e-5) -> None:
    """Feed random tokens; some rows leave on the way, others are taken twice or change places."""
    assert is_plain(model)
    rows = rows_of(lengths)
    batch = LiveBatch(model, rows, 0, tokens, CPU)
    chosen = {0: (0, 0, 1, 2, 3), 20: (4, 2, 1), 40: (1, 0, 1)}
    generator = torch.Generator().manual_seed(1)
    for step in range(tokens):
        if step in chosen:
            batch.select(chosen[step])
            rows = [list(rows[place]) for place in chosen[step]]
        token_B = torch.randint(2, 31, (len(rows),), generator=generator)
        batch.feed(token_B)
        rows = [[*row, token] for row, token in zip(rows, token_B.tolist(), strict=True)]
        torch.testing.assert_close(batch.logits_BV, whole_pass(model, rows), atol=close, rtol=close)
    assert batch._stepper is not None and batch.logits_BV.shape == (3, 31)


@pytest.mark.parametrize("lengths", [RAGGED, (6, 6, 6, 6)], ids=["padded", "of one length"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_step_is_a_whole_pass(family: str, lengths: Sequence[int], language_model: Build) -> None:
    """Past two growths of the cache: prompts of 9, and 75 tokens behind them."""
    compare(language_model(family, **LONG), lengths)


def test_biases_and_groups_of_heads_are_in_it() -> None:
    compare(qwen2())


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=str
)
def test_ties_and_biases_of_llama(changes: dict[str, Any], language_model: Build) -> None:
    model = language_model("llama", **LONG, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    compare(model)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_scaled_rotations_are_the_librarys(kind: str, language_model: Build) -> None:
    compare(language_model("llama", **LONG, rope_parameters=ROTATIONS[kind]))


@torch.no_grad()
def test_bfloat16_is_as_near_to_exact_as_the_librarys(language_model: Build) -> None:
    """Both against the same weights in float64, over twenty tokens of sixteen rows."""
    rounded = language_model("qwen3", dtype=torch.bfloat16, **LONG)
    exact = language_model("qwen3", dtype=torch.float64, **LONG)
    exact.load_state_dict({name: tensor.double() for name, tensor in rounded.state_dict().items()})
    rows = rows_of([7] * 16)
    batch, error = LiveBatch(rounded, rows, 0, 20, CPU), {"ours": 0.0, "the library's": 0.0}
    for token in range(2, 22):
        batch.feed(torch.full((16,), token))
        rows = [[*row, token] for row in rows]
        exact_BV = whole_pass(exact, rows)
        error["ours"] += float((batch.logits_BV - exact_BV).square().mean())
        error["the library's"] += float((whole_pass(rounded, rows) - exact_BV).square().mean())
    assert batch._stepper is not None and batch.logits_BV.dtype == torch.bfloat16
    assert 0 < error["ours"] < 1.3 * error["the library's"]


def test_the_norm_is_the_librarys_in_float64_too(language_model: Build) -> None:
    """It rounds to float32 there; a norm in float64 would differ by 1e-8."""
    compare(language_model("qwen3", dtype=torch.float64, **LONG), close=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_autocast_rounds_what_it_rounds_in_the_library(
    family: str, dtype: torch.dtype, language_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bits, logits of rows that come and go; matrices once and not at every token."""
    model, rows = qwen2() if family == "qwen2" else language_model(family, **LONG), rows_of(RAGGED)
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = (LiveBatch(model, rows, 0, 40, CPU) for _ in range(2))
        monkeypatch.setattr(theirs, "_can_step", False)
        for step in range(40):
            if step in (10, 25):
                for batch in (ours, theirs):
                    batch.select((2, 0, 0, 1))
            token_B = torch.arange(4) + 2 + step % 20
            for batch in (ours, theirs):
                batch.feed(token_B)
            assert torch.equal(ours.logits_BV, theirs.logits_BV) and ours.logits_BV.dtype == dtype
    assert theirs._stepper is None and ours._stepper is not None
    matrices = [matrix for layer in ours._stepper._decoder.layers for matrix in (layer.query, layer.down)]
    assert {weight.dtype for weight, _ in matrices} == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@torch.no_grad()
def test_autocast_leaves_float64_alone(language_model: Build) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(language_model("qwen3", dtype=torch.float64, **LONG), close=1e-12)


# -- whose own pass is asked ------------------------------------------------------------------------------------------


class Adapted(nn.Linear):
    """A projection that does more than multiply."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5


def adapted(model: Any) -> None:
    old = model.model.layers[1].self_attn.v_proj
    model.model.layers[1].self_attn.v_proj = new = Adapted(16, 8, bias=False)
    new.weight = old.weight


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda _, __, output: output * 0.5)


def hooked_before(model: Any) -> None:
    model.model.norm.register_forward_pre_hook(lambda _, given: (given[0] + 1.0,))


def replaced(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.forward = lambda *given, **named: (type(attention).forward(attention, *given, **named)[0] * 2, None)


CHANGED = [adapted, hooked, hooked_before, replaced]


@pytest.mark.parametrize("change", CHANGED)
def test_a_model_that_does_more_is_asked_itself(change: Callable[[Any], None], language_model: Build) -> None:
    """And what it does more is in what it writes."""
    model, rows = language_model("llama", **LONG), rows_of(RAGGED)
    assert is_plain(model)
    plain_BV = whole_pass(model, rows)
    change(model)
    assert not is_plain(model)
    assert not torch.allclose(whole_pass(model, rows), plain_BV, atol=1e-2)
    with torch.no_grad():
        batch = LiveBatch(model, rows, 0, 1, CPU)
        batch.feed(torch.tensor([4, 5, 6, 7]))
    grown = [[*row, token] for row, token in zip(rows, (4, 5, 6, 7), strict=True)]
    torch.testing.assert_close(batch.logits_BV, whole_pass(model, grown), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
    ids=["another family", "another activation", "a rotation that follows the length", "a window"],
)
def test_other_models_are_asked_themselves(family: str, changes: dict[str, Any], language_model: Build) -> None:
    assert is_plain(language_model("qwen3")) and not is_plain(language_model(family, **changes))


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_of_all_modules_ask_the_model(register: Callable[..., Any], language_model: Build) -> None:
    model = language_model("llama")
    handle = register(lambda *_: None)
    try:
        assert not is_plain(model)
    finally:
        handle.remove()
    assert is_plain(model)


# -- in the generator -------------------------------------------------------------------------------------------------


def test_rows_that_end_are_fed_no_more(language_model: Build, spelled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    feed = RotaryStepper.feed

    def watched(stepper: RotaryStepper, token_B: Tensor, position_B: Tensor) -> Tensor:
        fed.append(len(token_B))
        return feed(stepper, token_B, position_B)

    monkeypatch.setattr(RotaryStepper, "feed", watched)
    prompts = [Prompt(number, "", tuple(row)) for number, row in enumerate(rows_of((4, 4, 6, 6)))]
    generator = LocalGenerator(language_model("llama"), spelled)
    results = list(generator.generate(prompts, Sampling(8, 1.0, 1.0, 30, 0)))
    lengths = [len(completion.ids) for result in results for completion in result.completions]
    assert len(set(lengths)) > 5, "the example should hold many lengths"
    assert fed == [sum(length > step for length in lengths) for step in range(1, max(lengths))]


def test_the_model_trains_on_what_it_wrote(language_model: Build, spelled: Any) -> None:
    """Nothing of a step, which runs in inference mode, is left in a module for a later pass to meet."""
    model = language_model("qwen3").train()
    (result,) = LocalGenerator(model, spelled).generate([Prompt(0, "", (3, 4, 5))], Sampling(max_new_tokens=12))
    ids_1T = torch.tensor([[3, 4, 5, *result.completions[0].ids]])
    model(ids_1T, labels=ids_1T).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert model.training and not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
