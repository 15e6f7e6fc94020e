# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Traces
#
# A teacher writes its reasoning out and a student learns to write it. The loss is the cross-entropy of any language
# model; only its targets differ. This notebook shows what such a target is (text, tokens, a loss mask), works three
# exercises of the field with the package's own code, and reads what the studies found from the records that are
# committed under `experiments/`. Nothing is trained here and nothing is defined here.

# %%
import html
import json
import textwrap
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are not drawn here

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, Markdown, display
from pyarrow import csv

from research.losses.supervised import cross_entropy
from research.methods.base import Training
from research.methods.sft_trace import SftTrace
from research.models.language import LanguageModel
from research.records import Trace, Verdict
from research.results.statistics import summarise, wilson_interval
from research.results.study_file import read_study
from research.results.terminal import study_table, verdict_line
from research.seeding import seed_for
from research.tasks.arithmetic import ChainedSums
from research.tasks.files import folder_of
from research.tasks.grading import OUTCOMES, grade_parts
from research.tasks.released import read_released
from research.tasks.statements import report_on
from research.tasks.word_problems import SVAMP_FILES
from research.text.codec import Codec
from research.text.document import collate
from research.text.formats import TRACE_FORMATS, arrange
from research.text.template import Parsed
from research.text.templates import Alpaca, Plain, Think
from research.text.tokenizer import build_tokenizer
from research.traces.corruptions import CHANNELS, DETAIL, Corruption

ROOT = Path.cwd() if (Path.cwd() / "experiments").is_dir() else Path.cwd().parent
PROMPT, GRADED, END = "#DDDDDD", "#B9D6EC", "#F6C98F"  # token colours: not graded, graded, the EOS (graded too)
torch.set_num_threads(1)

# %% [markdown]
# ## 1. One trace: as text, as tokens, as a loss mask (claims C14, C15)
#
# As **text** a trace is an instruction pair. The prompt ends with the response header; the worked steps belong to the
# response and stand ahead of the answer, so that the answer is written with the steps in view.

# %%
traces = [
    Trace(
        problem="Sara has 12 apples. She buys 3 bags of 4 apples and gives 9 away. How many has she left?",
        chain="3 * 4 = 12\n12 + 12 = 24\n24 - 9 = 15",
        answer="15",
        index=0,
    ),
    Trace(
        problem="A train goes 60 km in each of 2 hours, then 45 km in each of 3. How far does it go?",
        chain="60 * 2 = 120\n45 * 3 = 135\n120 + 135 = 255",
        answer="255",
        index=1,
    ),
    Trace(
        problem="8 boxes hold 15 pens each. A third of the pens are red, 7 more are blue. How many are neither?",
        chain="8 * 15 = 120\n120 / 3 = 40\n40 + 7 = 47\n120 - 47 = 73",
        answer="73",
        index=2,
    ),
]
alpaca = Alpaca()
texts = [alpaca.prompt(t.problem) + alpaca.completion(t.chain, t.answer, "chain_then_answer") for t in traces]
print(texts[0])

# %% [markdown]
# As **tokens**: prompt and completion are tokenised apart and joined, and an EOS is appended. Grey tokens are the
# prompt, blue tokens are graded, and so is the EOS in orange: a student that is not graded on it never learns to stop.
# The blue outline marks the last token of the *prompt*. The loss at a place is about the token that comes next, so this
# place is graded: it predicts the first token of the response.

# %%
tokenizer = build_tokenizer("bpe", texts=texts, vocab_size=420)
codec = Codec(tokenizer, alpaca)
document = codec.encode(traces[0])
pieces = codec.pieces(document.ids)

figure, axis = plt.subplots(figsize=(10, 2.75), layout="constrained")
x = y = 0.0
for place, piece in enumerate(pieces):
    shown = piece.replace("\n", "↵")
    last_of_prompt = place == document.prompt_length - 1
    colour = PROMPT if place < document.prompt_length else END if place == len(pieces) - 1 else GRADED
    edge = {"edgecolor": "#0072B2", "linewidth": 2, "zorder": 3} if last_of_prompt else {"edgecolor": "white"}
    axis.add_patch(plt.Rectangle((x, y - 0.4), len(shown), 0.8, facecolor=colour, **edge))
    axis.text(x + len(shown) / 2, y, shown, family="monospace", fontsize=9.5, ha="center", va="center", zorder=4)
    if last_of_prompt:
        axis.annotate(
            "graded here: predicts the first token of the response",
            (x + len(shown), y),
            (x + len(shown) + 3, y),
            va="center",
            fontsize=9,
            color="#0072B2",
            arrowprops={"arrowstyle": "-", "color": "#0072B2"},
        )
    x, y = (0.0, y - 1) if piece.endswith("\n") else (x + len(shown), y)
axis.set(xlim=(-0.5, 105), ylim=(y - 0.7, 0.7))
axis.axis("off")
plt.show()
print(f"{document.prompt_length} prompt tokens + {len(document.completion_ids)} graded ones, EOS included")

# %% [markdown]
# As a **loss mask**: labels are shifted once, in `research.text.document.collate`, so that `label` stands where it is
# predicted and `weight` says what the place counts. The last column is the other common notation, labels equal to the
# ids and -100 where nothing is graded, which is shifted inside the model. Both ignore as many places as there are
# prompt tokens. The places around the two borders:

# %%
batch = collate([document], prompt_loss_weight=0.0, pad_id=codec.pad_id)
labels = codec.pieces(batch.label_BT[0].tolist())
border, end = document.prompt_length, len(document)
rows = ["| place | token | part | label: what comes next | weight | ids and -100 |", "|--:|---|---|---|--:|--:|"]
for place in [*range(border - 3, border + 2), *range(end - 3, end)]:
    part = "prompt" if place < border else "completion"
    token, label = json.dumps(pieces[place]), json.dumps(labels[place]) if place < end - 1 else ""
    weight = f"{float(batch.weight_BT[0, place]):g}"
    bold = "**" if place in (border - 1, end - 1) else ""
    other = document.ids[place] if place >= border else -100
    rows.append(f"| {bold}{place}{bold} | `{token}` | {part} | {f'`{label}`' if label else '-'} | {weight} | {other} |")
display(Markdown("\n".join(rows)))

# %% [markdown]
# ## 2. Three templates, one problem
#
# `plain` is for symbolic tasks at one character a token, `alpaca` has headers and an answer line, `think` puts the
# chain between tags. The prompt is grey and the graded completion bold; the tags of `think` are graded tokens, since
# the student has to write them.

# %%
sums = ChainedSums(num_terms=4)
problem = sums.problems("train", 1)[0]
head, body = [], []
for template in (Plain(), alpaca, Think()):
    chain = problem.chain.replace(sums.step_separator, template.step_separator)
    prompt, completion = template.prompt(problem.text), template.completion(chain, problem.answer, "chain_then_answer")
    assert template.parse(completion, "chain_then_answer") == Parsed(chain, problem.answer)
    head.append(f'<th style="text-align:left">{type(template).__name__.lower()}</th>')
    body.append(
        '<td style="text-align:left;vertical-align:top;padding-right:3em"><pre>'
        f'<span style="color:#777">{html.escape(prompt)}</span><b>{html.escape(completion)}</b>'
        f'<span style="background:{END};color:#222">&lt;eos&gt;</span></pre></td>'
    )
display(HTML(f"<table><tr>{''.join(head)}</tr><tr>{''.join(body)}</tr></table>"))

# %% [markdown]
# ## 3. Exercises
#
# ### 3.1 Format three problems
#
# The three word problems above, as documents. Checked on the ids, not on the text: the prompt of generation is a prefix
# of the document, the chain precedes the answer, the only EOS stands at the end, and what is read back is what went in.

# %%
documents = [codec.encode(trace) for trace in traces]
print(f"{'':10s}{'prompt':>8s}{'graded':>8s}   prefix  chain first  one EOS, last  read back  steps that hold")
for trace, encoded in zip(traces, documents, strict=True):
    written = codec.decode(encoded.completion_ids)
    checks = (
        list(encoded.ids[: encoded.prompt_length]) == codec.prompt_ids(trace.problem),
        written.index(trace.chain) < written.index("Answer:"),
        [place for place, token in enumerate(encoded.ids) if token in codec.eos_ids] == [len(encoded) - 1],
        codec.parse(written) == Parsed(trace.chain, trace.answer),
    )
    steps = report_on(trace.chain, trace.problem)
    told = "".join(f"{check!s:{width}s}" for check, width in zip(checks, (8, 13, 15, 11), strict=True))
    counts = f"{encoded.prompt_length:8d}{len(encoded.completion_ids):8d}"
    print(f"problem {trace.index + 1} {counts}   {told}{steps.num_valid} of {steps.num_steps}")

# %% [markdown]
# ### 3.2 Verify the mask (claim C16)
#
# First count. Then a freshly built student (two layers, never trained), because for it every token is about equally
# surprising: its loss starts near $\ln V$.

# %%
batch = collate(documents, prompt_loss_weight=0.0, pad_id=codec.pad_id)
padding = int((batch.segment_BT == 0).sum())
ignored = int((batch.weight_BT == 0).sum()) - padding
print(f"places: {batch.ids_BT.numel()}, of which padding {padding}, ignored {ignored}, graded {batch.step_weight:.0f}")
print(f"prompt tokens: {sum(encoded.prompt_length for encoded in documents)}, as many as are ignored")

torch.manual_seed(seed_for(0, "notebook/student"))
student = LanguageModel(
    "llama", 32, 2, 4, vocab_size=codec.vocab_size, eos_token_id=codec.eos_ids[0], pad_token_id=codec.pad_id
)
method = SftTrace(Training(student, torch.optim.AdamW, None, {}))
print(f"\nln V = {torch.tensor(float(codec.vocab_size)).log():.3f}, V = {codec.vocab_size}")
for weight in (0.0, 0.1, 1.0):
    batch = collate(documents, prompt_loss_weight=weight, pad_id=codec.pad_id)
    with torch.no_grad():
        (part,) = method.components(batch)
    counted = int((batch.weight_BT > 0).sum())
    print(
        f"prompt_loss_weight = {weight:<4g} {counted:4d} places count, weight {part.step_count:6.1f}, "
        f"loss {float(part.loss.total) / part.step_count:.4f}"
    )

# %% [markdown]
# The loss moves when the mask goes, and here by little, because an untrained student knows neither part. Two further
# checks say that the mask is where it should be: other prompt targets leave the loss as it is, and the gradient is zero
# at exactly the logits that are not graded. (Leaving out an `ignore_index=-100` argument would prove nothing, -100 is
# its default; to take the mask away, real prompt ids have to stand in the labels.)

# %%
batch = collate(documents, prompt_loss_weight=0.0, pad_id=codec.pad_id)
other_targets = replace(batch, label_BT=batch.label_BT.where(batch.completion_BT, torch.tensor(7)))
with torch.no_grad():
    (before,), (after,) = method.components(batch), method.components(other_targets)
print("loss unchanged by other prompt targets:", bool(before.loss.total == after.loss.total))
logits_BTV = student(*batch.network_inputs())
logits_BTV.retain_grad()
cross_entropy(logits_BTV, batch.label_BT, weight_N=batch.weight_BT).mean().backward()
moved_BT = logits_BTV.grad.abs().sum(dim=-1) > 0
print("gradient exactly at graded places:", bool((moved_BT == (batch.weight_BT > 0)).all()))

# %% [markdown]
# A *trained* student shows the mask plainly. These are the committed runs of `chain_vs_answer` (prompts never graded):
# the completion is known by heart, and the prompt, which nothing ever asked for, is worse than a uniform guess.

# %%
runs = csv.read_csv(ROOT / "experiments/chain_vs_answer/results.csv").to_pylist()
trained = [row for row in runs if row["arm"] == "chain_then_answer" and row["status"] == "completed"]
completion = summarise([row["test/nll"] for row in trained])
prompts = summarise([row["test/prompt_nll"] for row in trained])
share = trained[0]["test/completion_tokens"] / (trained[0]["test/completion_tokens"] + trained[0]["test/prompt_tokens"])
print(f"{len(trained)} students, nats per token: completion {completion.mean:.4f}, prompt {prompts.mean:.1f}")
print(f"all tokens counted alike: {share * completion.mean + (1 - share) * prompts.mean:.1f}")

# %% [markdown]
# ### 3.3 Find the wrong step (claim C22)
#
# A chain of running totals. The second one below has two errors that cancel: the answer is right, so an answer key
# keeps it. The step verifier works each total out anew from the one before *as it was written*, and finds both.

# %%
sums = ChainedSums(num_terms=6)
problem = sums.problems("train", 1)[0]
sound = Trace(problem.text, problem.chain, problem.answer, problem.index)
spoilt = Corruption({"compensating_pair": 1.0}, seed=1).apply(sound)
print(f"problem          {problem.text} = {problem.answer}\n")
for name, trace in (("as it should be", sound), ("two errors", spoilt)):
    report = sums.verify_steps(problem, trace.chain)
    grade = grade_parts(sums, problem, Parsed(trace.chain, trace.answer))
    where = "no wrong step" if report.first_wrong is None else f"first wrong step: number {report.first_wrong + 1}"
    print(f"{name:16s} {trace.chain}  answer {trace.answer}")
    print(f"{'':16s} answer key: {grade.verdict}; steps: {report.num_valid} of {report.num_steps} valid, {where}")
    print(f"{'':16s} outcome: {grade.outcome}\n")

# %% [markdown]
# Every error channel of the package on the same 300 problems: how many of the spoilt traces does each filter let
# through? The answer key stops only what ends in a wrong answer.

# %%
print(f"{'channel':20s}{'spoilt':>8s}{'key keeps':>12s}{'steps keep':>12s}   outcomes")
for channel in CHANNELS:
    corruption, kept, outcomes = Corruption({channel: 1.0}), Counter(), Counter()
    for problem in sums.problems("train", 300):
        trace = corruption.apply(Trace(problem.text, problem.chain, problem.answer, problem.index))
        if trace.details[DETAIL] != channel:  # nothing to spoil, such as a sum without carries
            continue
        grade = grade_parts(sums, problem, Parsed(trace.chain, trace.answer))
        kept.update(spoilt=1, key=grade.correct, steps=grade.steps.valid)
        outcomes[grade.outcome] += 1
    told = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
    print(f"{channel:20s}{kept['spoilt']:8d}{kept['key']:12d}{kept['steps']:12d}   {told}")

# %% [markdown]
# ### 3.4 What slips through in real traces
#
# PaLM-540B wrote a rationale and an equation for each problem of SVAMP (arXiv:2305.02301). Its answer is the value of
# the equation, so a mistake in the written arithmetic never reaches the key. The chains below are free text: what can
# be checked are the statements `a + b = c` in them.

# %% tags=["real_data"]
folder = folder_of(None)
svamp = read_released("svamp_palm540b") if folder and (folder / SVAMP_FILES["train"]).exists() else None
if svamp is None:
    print("RESEARCH_DATA_DIR names no folder with the released traces: this cell is skipped.")
else:
    every = [trace for split in svamp.traces.values() for trace in split]
    table = Counter((trace.details["outcome"], trace.details["verdict"] == Verdict.CORRECT) for trace in every)
    skipped = sum(sum(counts.values()) for counts in svamp.skipped.values())
    print(f"{len(every)} traces, and {skipped} without an answer that can be read\n")
    print(f"{'outcome':16s}{'right answer':>14s}{'wrong answer':>14s}")
    for outcome in OUTCOMES:
        if table[outcome, True] or table[outcome, False]:
            print(f"{outcome:16s}{table[outcome, True]:14d}{table[outcome, False]:14d}")
    right = sum(count for (_, correct), count in table.items() if correct)
    print(f"{'all':16s}{right:14d}{len(every) - right:14d}\n")
    for outcome in ("lucky_answer", "unused_chain"):
        low, high = wilson_interval(table[outcome, True], right)
        share = table[outcome, True] / right
        print(f"P({outcome} | right answer) = {share:.3f}, 95 % interval {low:.3f} to {high:.3f}")

# %% [markdown]
# An answer key keeps the first column, and with it chains with a statement that does not hold (`lucky_answer`) and
# chains that end in another value than the answer given (`unused_chain`). A check of statements alone keeps the row
# `valid_wrong`: arithmetic worked out well, and the wrong one. Neither replaces the other. Three that the key keeps;
# the first is a slip, the second a needless step that rounds, the third a plan that does not lead to the answer:

# %% tags=["real_data"]
if svamp is None:
    print("RESEARCH_DATA_DIR names no folder with the released traces: this cell is skipped.")
else:
    found = {trace.index: trace for trace in svamp.traces["train"]}
    for index in (58, 39, 117):
        trace = found[index]
        question = " ".join(trace.problem.split())
        print(textwrap.fill(f"Q  {question}", 110, subsequent_indent="   "))
        print(textwrap.fill(f"A  {trace.chain}", 110, subsequent_indent="   "))
        print(f"   equation {trace.details['raw_answer']} = {trace.answer}, {trace.details['verdict']}:", end=" ")
        print(f"{trace.details['outcome']}\n")

# %% [markdown]
# ## 4. What the studies found
#
# The question of each study, its arms and the rule for its verdict (`study.yaml`) were fixed before the runs. A study
# is shown once its verdict is committed. Run one again with `distill study experiments/NAME`.

# %%
STUDIES = [
    "chain_vs_answer",
    "prompt_loss",
    "wrong_steps",
    "self_taught",
    "trace_curation",
    "student_ladder",
]
shown = [name for name in STUDIES if (ROOT / "experiments" / name / "verdict.json").exists()]
verdicts = {name: json.loads((ROOT / "experiments" / name / "verdict.json").read_text()) for name in shown}
rows = [
    f"| {name} | {v['claim']} | **{v['verdict']}** | {sum(arm['n'] for arm in v['arms'].values())} |"
    for name, v in verdicts.items()
]
display(Markdown("\n".join(["| study | claims | verdict | runs |", "|---|---|---|--:|", *rows])))
for name in STUDIES:
    if name not in shown:
        print(f"{name}: no verdict is committed yet")

# %% [markdown]
# What the arms of `chain_vs_answer` train on: the graded text of one trace in each format. Only the chain differs, and
# where the answer stands. `filler_then_answer` has as many tokens as the chain and nothing in them; `swapped_chain` has
# the chain of another problem.

# %%
sums = ChainedSums(num_terms=8, highest=9)
tokenizer = build_tokenizer("characters", alphabet=sums.alphabet + Plain.alphabet)
originals = [Trace(p.text, p.chain, p.answer, p.index) for p in sums.problems("train", 8)]
print(f"{'prompt':22s}{Plain().prompt(originals[0].problem)}")
for trace_format in TRACE_FORMATS:
    arranged = arrange(originals, trace_format, 0, sums.step_separator)
    encoding = Codec(tokenizer, Plain(), trace_format=trace_format)
    encoded = encoding.encode(arranged[0])
    print(f"{trace_format:22s}{''.join(encoding.pieces(encoded.completion_ids))}")

# %% [markdown]
# One picture per study. *Top left*: accuracy of every seed (dots) with the mean and its 95 % interval (Student's t).
# *Top right*: how the completions of an arm come to their answers, on the same rows. *Bottom left*: accuracy against
# what training cost, rollouts included. *Bottom right*: the share of valid steps against the share of right answers;
# on the diagonal they go together. Arms without chains have no valid steps and are not in it. Where a study crosses its
# arms with sizes, colour is the arm and the mark is the size, and costs are on a logarithmic axis.

# %%
ARM_COLOURS = ["#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#555555", "#8C6D31"]
OUTCOME_COLOURS = {
    "valid_right": "#4C9F70",
    "lucky_answer": "#E9B44C",
    "unused_chain": "#7FB7DA",
    "wrong_step": "#C8553D",
    "skipped_step": "#B07AA1",
    "valid_wrong": "#3D5A80",
    "unchecked": "#9A9A9A",
    "no_chain": "#DDDDDD",
}
LEVEL_MARKERS = "osD^v"  # sizes of a student, in the order of the study
for name in shown:
    study = read_study(ROOT / "experiments" / name)
    rows = csv.read_csv(ROOT / "experiments" / name / "results.csv").to_pylist()
    arms = {}
    for row in rows:
        if row["role"] == "arm" and row["status"] == "completed":
            arms.setdefault(", ".join([row["arm"], *(str(row[factor]) for factor in study.factors)]), []).append(row)
    figure, axes = plt.subplot_mosaic(
        [["arms", "outcomes"], ["cost", "steps"]],
        figsize=(10, 4.4 + 0.36 * len(arms)),
        height_ratios=[0.9 + 0.36 * len(arms), 3.1],
        layout="constrained",
    )
    left = {outcome: 0.0 for outcome in OUTCOME_COLOURS}
    kinds = list(dict.fromkeys(found[0]["arm"] for found in arms.values()))
    colours = [ARM_COLOURS[kinds.index(found[0]["arm"]) % len(ARM_COLOURS)] for found in arms.values()]
    for place, (found, colour) in enumerate(zip(arms.values(), colours, strict=True)):
        level = sum(other[0]["arm"] == found[0]["arm"] for other in list(arms.values())[:place])
        mark = LEVEL_MARKERS[level % len(LEVEL_MARKERS)]
        accuracy = [row["test/accuracy"] for row in found]
        mean = summarise(accuracy)
        whisker = None if mean.low is None else [[mean.mean - mean.low], [mean.high - mean.mean]]
        bar = {"fmt": mark, "ms": 6, "color": colour, "mec": "white", "capsize": 2.5, "zorder": 3}
        axes["arms"].plot(accuracy, [place + 0.22] * len(found), mark, ms=3.5, color=colour, alpha=0.45, mec="none")
        axes["arms"].errorbar(mean.mean, place - 0.08, xerr=whisker, **bar)
        start = 0.0
        for outcome, shade in OUTCOME_COLOURS.items():
            share = sum(row[f"test/outcome_{outcome}"] or 0.0 for row in found) / len(found)
            axes["outcomes"].barh(place, share, 0.7, start, color=shade, edgecolor="white", linewidth=0.5)
            start, left[outcome] = start + share, left[outcome] + share
        cost = [row["run_flops"] / 1e12 for row in found]
        axes["cost"].plot(cost, accuracy, mark, ms=3.5, color=colour, alpha=0.45, mec="none")
        axes["cost"].errorbar(summarise(cost).mean, mean.mean, yerr=whisker, **bar)
        checked = [row for row in found if row["test/step_validity"] is not None]
        points = [row["test/step_validity"] for row in checked], [row["test/accuracy"] for row in checked]
        axes["steps"].plot(*points, mark, ms=5, color=colour, alpha=0.6, mec="white", mew=0.5)
    axes["arms"].set_yticks(range(len(arms)), list(arms))
    for tick, colour in zip(axes["arms"].get_yticklabels(), colours, strict=True):
        tick.set_color(colour)
    axes["arms"].set(xlim=(-0.03, 1.03), ylim=(len(arms) - 0.4, -0.6), xlabel="accuracy", title="accuracy by arm")
    axes["outcomes"].set(xlim=(0, 1), ylim=(len(arms) - 0.4, -0.6), yticks=[], xlabel="share of completions")
    axes["outcomes"].set_title("how they come to their answers")
    seen = [outcome for outcome, total in left.items() if total > 0.005]
    keys = [plt.Rectangle((0, 0), 1, 1, color=OUTCOME_COLOURS[outcome]) for outcome in seen]
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False, "fontsize": 9, "handlelength": 1}
    axes["outcomes"].legend(keys, seen, **place)
    axes["cost"].set(ylim=(-0.03, 1.03), xlabel="training, TFLOP", ylabel="accuracy")
    if study.factors:
        axes["cost"].set_xscale("log")
    else:
        axes["cost"].set_xlim(0, None)
    axes["cost"].set_title("accuracy against cost")
    axes["steps"].plot([0, 1], [0, 1], color="#BBBBBB", linewidth=0.8, zorder=0)
    axes["steps"].set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="valid steps", ylabel="accuracy")
    axes["steps"].set_title("steps against answers")
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    display(Markdown(f"### {name}\n\n{study.question}\n\n{verdict_line(ROOT / 'experiments' / name)}"))
    plt.show()
    print(study_table(ROOT / "experiments" / name))

# %% [markdown]
# How to read `chain_vs_answer`. With the chain first nearly every problem is solved, by valid steps. At the same FLOPs
# answers alone stay far below, so the gain is not bought with compute; and neither as many filler tokens nor steps of
# the right kind in the wrong order or from another problem bring any of it, so it is the *content* of the steps that
# counts. With the answer first the chain that follows is still nearly always valid, and mostly ends in another value
# than the answer given (`unused_chain`): the student can work the problem out, and guessed before it did. Chance is
# 10 % here, and a student that writes no step does somewhat better than that.
#
# The secondary comparisons of all studies shown, with their intervals:

# %%
for name, verdict in verdicts.items():
    for contrast, entry in verdict["secondary"].items():
        interval = "-" if entry["estimate"] is None else f"{entry['estimate']:.4g}  [{entry['low']}, {entry['high']}]"
        print(f"{name:18s} {contrast:30s} {entry['verdict']:13s} {interval} {entry['unit'] or ''}".rstrip())
