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
# # On policy
#
# The student writes, and a teacher says at every token what it would have written there. Or an answer key says whether
# the whole was right, and that is all (GRPO). This notebook puts the methods side by side at one cost, looks at what
# each gains while it spends, and at where along a chain a student leaves its teacher. Sections 1 to 4 only read the
# records that are committed under `experiments/`; a study that has none yet is named and left out. Section 5 loads two
# small networks and has one of them write. Nothing is trained here and nothing is defined here.

# %%
import json
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are not drawn here

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, Markdown, display
from pyarrow import csv

from research.data.traces import TraceData
from research.evaluation.completions import write_completions
from research.evaluation.token_distances import token_distances
from research.generation.in_process import LocalGenerator
from research.records import Sampling
from research.results.break_even import break_even, pareto_front
from research.results.curve_figure import curve_files
from research.results.curves import CURVES_FILE, read_study_curves
from research.results.exposure import EXPOSURE_FILE, exposure_by_place
from research.results.items import beyond, read_study_items
from research.results.statistics import summarise
from research.results.study_file import read_study
from research.results.terminal import study_table, verdict_line
from research.results.token_figure import draw_tokens
from research.tasks.arithmetic import ChainedSums
from research.tasks.grading import Grader
from research.teachers.load import load_network
from research.text.templates import Plain

ROOT = Path.cwd() if (Path.cwd() / "experiments").is_dir() else Path.cwd().parent
STUDIES = [
    "method_table", "distill_vs_rl", "strong_to_weak", "strong_to_weak_sum2", "pass_at_k", "divergence_direction",
    "exposure_bias", "weak_teacher", "two_modes",
]  # fmt: skip
FOLDERS = {name: ROOT / "experiments" / name for name in STUDIES}
shown = [name for name in STUDIES if (FOLDERS[name] / "verdict.json").exists()]
torch.set_num_threads(1)

# %% [markdown]
# ## 1. Every method, one base, one budget (claims C26, C31)
#
# All arms go on from the same base and stop at the same FLOPs, which count what a method makes others do: rollouts,
# their prompts, the teacher's reading of them. The training of the teacher is not in it; traces were written once, for
# all that use them. Intervals are Student's, over seeds. *Sampled* is one answer at temperature 1, *of 16* says that at
# least one of sixteen is right.

# %%
SHOWN = {
    "greedy": "test/accuracy",
    "sampled": "test/sampled_pass_at_1",
    "of 16": "test/sampled_pass_at_16",
    "valid steps": "test/step_validity",
}
PARTS = {
    "updates": ["student_update"],
    "rollouts": ["rollout", "prompt_prefill"],
    "teacher": ["teacher_scoring"],
}
name = "method_table"
if name not in shown:
    print(f"{name}: no results are committed yet.")
else:
    study = read_study(FOLDERS[name])
    runs = [row for row in csv.read_csv(FOLDERS[name] / "results.csv").to_pylist() if row["status"] == "completed"]
    heads = ["method", "seeds", *SHOWN, *(f"{part}, GFLOP" for part in PARTS), "steps"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for arm in study.arms.values():
        found = [row for row in runs if row["role"] == "arm" and row["arm"] == arm.name]
        cells = []
        for column in SHOWN.values():
            values = [row[column] for row in found if row.get(column) is not None]
            mean = summarise(values) if values else None
            interval = "" if mean is None or mean.low is None else f" [{mean.low:.3f}, {mean.high:.3f}]"
            cells.append("-" if mean is None else f"{mean.mean:.3f}{interval}")
        for parts in PARTS.values():
            cost = sum(row[f"{part}_flops"] or 0.0 for row in found for part in parts) / max(1, len(found))
            cells.append(f"{cost / 1e9:.0f}" if cost else "-")
        steps = [row["budget/steps"] for row in found if row.get("budget/steps") is not None]
        cells.append(f"{sum(steps) / len(steps):.0f}" if steps else "-")
        lines.append(f"| {arm.name} | {len(found)} | {' | '.join(cells)} |")
    display(Markdown(f"{study.question}\n\n" + "\n".join(lines) + f"\n\n{verdict_line(FOLDERS[name])}"))
    display(Image(str(FOLDERS[name] / "figure.png"), width=900))

# %% [markdown]
# ## 2. Accuracy against FLOPs (claim C32)
#
# What validation said while the students were trained, over what they had spent by then. A thin line is one seed; the
# thick one is the mean wherever all seeds have been. The lines of an arm begin at its first validation, not at zero.

# %%
for name in ("method_table", "distill_vs_rl", "strong_to_weak", "strong_to_weak_sum2"):
    pictures = [file for file in curve_files(read_study(FOLDERS[name])) if file.endswith("_flops.png")]
    if name not in shown:
        print(f"{name}: no results are committed yet.")
        continue
    display(Markdown(f"### {name}\n\n{verdict_line(FOLDERS[name])}"))
    for file in pictures:
        display(Image(str(FOLDERS[name] / file), width=900))
    print(study_table(FOLDERS[name]))

# %% [markdown]
# ### When a teacher has paid for itself (claim C27)
#
# Someone pays for the teacher, once. *Free* counts what a student's own run spends; *charged* adds the whole teacher
# and the writing of its traces to that one student. A star marks the front: no other arm is better at no greater cost.
# k\* is how many students must share the teacher before distilling them is cheaper than RL: the teacher's cost, over
# what a student saves on the way to where GRPO ends.

# %%
name, metric = "method_table", "val/sampled_accuracy"
if name not in shown:
    print(f"{name}: no results are committed yet.")
else:
    study = read_study(FOLDERS[name])
    runs = [row for row in csv.read_csv(FOLDERS[name] / "results.csv").to_pylist() if row["status"] == "completed"]
    points = {}
    for arm in (arm for arm in study.arms if arm != "base"):
        found = [row for row in runs if row["role"] == "arm" and row["arm"] == arm]
        own, teacher = (
            sum(sum(row[f"{part}_flops"] or 0.0 for part in parts) for row in found) / len(found) / 1e12
            for parts in (("student_update", "rollout", "prompt_prefill", "teacher_scoring"), ("teacher_training",))
        )
        points[arm] = (summarise([row[study.metric] for row in found]).mean, own, own + teacher)
    lines = ["| method | sampled pass@1 | free, TFLOP | charged, TFLOP |", "|---|--:|--:|--:|"]
    fronts = [pareto_front({arm: (point[0], round(point[at], 2)) for arm, point in points.items()}) for at in (1, 2)]
    for arm, (score, free, charged) in points.items():
        stars = [" *" if arm in front else "" for front in fronts]
        lines.append(f"| {arm} | {score:.3f} | {free:.2f}{stars[0]} | {charged:.2f}{stars[1]} |")
    curves = read_study_curves(FOLDERS[name] / CURVES_FILE, study)
    told = ["| distilled by | to GRPO's level, TFLOP | GRPO, TFLOP | k* | 95 % interval |", "|---|--:|--:|--:|--:|"]
    for arm in ("sft_trace", "on_policy"):
        teacher = 1e12 * (points[arm][2] - points[arm][1])
        paid = break_even(curves["grpo"], curves[arm], metric, teacher)
        ends = " to ".join("no end" if end is None else f"{end:.2f}" for end in (paid.low, paid.high))
        few = "-" if paid.students is None else f"{paid.students:.2f}"
        told.append(f"| {arm} | {paid.distilled / 1e12:.2f} | {paid.direct / 1e12:.2f} | {few} | {ends} |")
    display(Markdown("\n".join(lines) + "\n\n" + "\n".join(told)))

# %% [markdown]
# ## 3. Wider or only sharper? (claim C33)
#
# The share of problems that at least one of k answers solves, on a second task: 1,016 sums of two numbers of two
# digits. A method that only sharpens lifts the left of its line and meets the start's at the right; one that teaches
# something new stays above it. Unbiased from 64 samples of each problem; bands are 95 % intervals over seeds.

# %%
name = "pass_at_k"
KS = (1, 2, 4, 8, 16, 32, 64)
COLOURS = {"start": "#777777", "sft": "#D55E00", "on_policy": "#0072B2", "grpo": "#009E73"}
if name not in shown:
    print(f"{name}: no results are committed yet.")
else:
    runs = [row for row in csv.read_csv(FOLDERS[name] / "results.csv").to_pylist() if row["status"] == "completed"]
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for arm, colour in COLOURS.items():
        found = [row for row in runs if row["arm"] == arm]
        points = [summarise([row[f"test/sampled_pass_at_{k}"] for row in found]) for k in KS]
        axis.plot(KS, [point.mean for point in points], "o-", color=colour, ms=4, label=arm.replace("_", " "))
        low, high = ([getattr(point, end) for point in points] for end in ("low", "high"))
        if low[0] is not None:
            axis.fill_between(KS, low, high, color=colour, alpha=0.15, lw=0)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="k", ylabel="pass@k, test", xticks=KS, xticklabels=KS, ylim=(0, 1.02))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", frameon=False)
    plt.show()
    display(Markdown(verdict_line(FOLDERS[name])))

# %% [markdown]
# ### Where the teacher itself fails (claim C27)
#
# A teacher that is right in two samples of five, and what its student, the answer key and both together make of the
# problems that it solved in none of sixteen tries. They were picked by one draw of the teacher: in a second draw it
# would solve some of them too, so the student that copies it is the line to compare with, not zero.

# %%
name = "weak_teacher"
if name not in shown:
    print(f"{name}: no results are committed yet.")
else:
    study = read_study(FOLDERS[name])
    items = read_study_items(FOLDERS[name] / "items.parquet")
    runs = [row for row in csv.read_csv(FOLDERS[name] / "results.csv").to_pylist() if row["status"] == "completed"]
    heads = ["pass@1, all", "pass@16, all", "pass@1, where the teacher fails", "solved in 16 there"]
    lines = [f"| arm | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for arm in study.arms:
        found = [row for row in runs if row["arm"] == arm]
        there = [beyond(items, f"{arm}/seed={row['seed']}", f"teacher/seed={row['seed']}") for row in found]
        columns = [[row[f"test/sampled_pass_at_{k}"] for row in found] for k in (1, 16)]
        columns += [[one.pass_at_1 for one in there], [one.solved for one in there]]
        means = [summarise(values) for values in columns]
        cells = [f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]" for mean in means]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    problems = [one.problems for one in there]
    told = f"Problems that the teacher fails: {min(problems)} to {max(problems)} of {len(items.index_I)} in a seed."
    display(Markdown(f"{study.question}\n\n" + "\n".join(lines) + f"\n\n{told}\n\n{verdict_line(FOLDERS[name])}"))

# %% [markdown]
# ## 4. Exposure bias, place by place (claim C34)
#
# A student that learns from stored text sees prefixes that its teacher wrote; when it is used it stands on its own. The
# exposure gap is how much further it is from the teacher there: KL(teacher || student) of the next token on prefixes
# that the student sampled, less the same on prefixes that the teacher sampled. `share` is the share of training steps
# on the student's own words.

# %%
name = "divergence_direction"
columns = ["kl_on_teacher_prefixes", "kl_on_student_prefixes", "exposure_gap", "first_error_step", "accuracy"]
if name not in shown:
    print(f"{name}: no results are committed yet.")
else:
    study = read_study(FOLDERS[name])
    runs = [row for row in csv.read_csv(FOLDERS[name] / "results.csv").to_pylist() if row["status"] == "completed"]
    lines = [f"| divergence | share | {' | '.join(columns)} |", "|---|--:|" + "--:|" * len(columns)]
    for arm in study.arms:
        for share in study.factors["share"]:
            found = [row for row in runs if row["arm"] == arm and row["share"] == float(share)]
            known = [
                [row[f"test/{column}"] for row in found if row[f"test/{column}"] is not None] for column in columns
            ]
            means = [f"{summarise(values).mean:.4f}" if values else "-" for values in known]
            lines.append(f"| {arm} | {share} | {' | '.join(means)} |")
    display(Markdown(f"{study.question}\n\n" + "\n".join(lines) + f"\n\n{verdict_line(FOLDERS[name])}"))

# %% [markdown]
# The same place by place, 0 being the first token of a completion, for students that never (0) and always (1) trained
# on their own words. Solid: on the student's own prefixes; dashed: on the teacher's. Bands are 95 % intervals over
# seeds. Places that fewer than a tenth of the completions reach are left out. A completion of these sums reads
# `04;02#02`: two totals of two digits, the answer, and an EOS at place 8.

# %%
SHARES = {"0": "#D55E00", "1": "#0072B2"}
WRITERS = {"student": "-", "teacher": "--"}
if not (FOLDERS[name] / EXPOSURE_FILE).exists():
    print(f"{name}: no distances by place are committed yet.")
else:
    study = read_study(FOLDERS[name])
    places = exposure_by_place(FOLDERS[name] / EXPOSURE_FILE, study)
    figure, axes = plt.subplots(1, len(study.arms), figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis, arm in zip(axes, study.arms, strict=True):
        for share, colour in SHARES.items():
            for writer, style in WRITERS.items():
                points = places.get(f"{arm}, share {share}", {}).get(writer, [])
                x, mean = [point["place"] for point in points], [point["mean"] for point in points]
                axis.plot(x, mean, style, color=colour, label=f"share {share}, {writer}'s prefixes")
                if points and points[0]["low"] is not None:
                    low, high = ([max(0.0, point[end]) for point in points] for end in ("low", "high"))
                    axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        axis.set(title=arm.replace("_", " "), xlabel="place in the completion")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="KL(teacher || student), nats", ylim=(0, None))
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8.5)
    plt.show()

# %% [markdown]
# ### The same where answers are long enough to drift in
#
# Sums of sixteen numbers: fifteen totals before the answer, an EOS at about place 32. All four students go on for 80
# steps from the same off-policy start; *off* reads the teacher's traces, *on* its own words. Shown are the places of
# the totals, every second one: separators stand between. At the first total both prefixes are the prompt alone.

# %%
name = "exposure_bias"
PAIRS = {"forward KL": ("forward_off", "forward_on"), "reverse KL": ("reverse_off", "reverse_on")}
if name not in shown:
    print(f"{name}: no results are committed yet.")
else:
    study = read_study(FOLDERS[name])
    runs = [row for row in csv.read_csv(FOLDERS[name] / "results.csv").to_pylist() if row["status"] == "completed"]
    lines = [f"| arm | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for arm in study.arms:
        found = [row for row in runs if row["arm"] == arm]
        known = [[row[f"test/{column}"] for row in found if row[f"test/{column}"] is not None] for column in columns]
        lines.append(f"| {arm} | {' | '.join(f'{summarise(v).mean:.4f}' if v else '-' for v in known)} |")
    display(Markdown(f"{study.question}\n\n" + "\n".join(lines) + f"\n\n{verdict_line(FOLDERS[name])}"))
    places = exposure_by_place(FOLDERS[name] / EXPOSURE_FILE, study)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis, (title, pair) in zip(axes, PAIRS.items(), strict=True):
        for arm, colour in zip(pair, SHARES.values(), strict=True):
            for writer, style in WRITERS.items():
                points = [point for point in places[arm][writer] if point["place"] and point["place"] % 2 == 0]
                x, mean = [point["place"] for point in points], [point["mean"] for point in points]
                axis.plot(x, mean, style, color=colour, label=f"{arm.rpartition('_')[2]} policy, {writer}'s prefixes")
                if points[0]["low"] is not None:
                    low, high = ([max(0.0, point[end]) for point in points] for end in ("low", "high"))
                    axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        axis.set(title=title, xlabel="place in the completion")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="KL(teacher || student), nats", ylim=(0, None))
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8.5)
    plt.show()

# %% [markdown]
# ## 5. One rollout, token by token
#
# The base and the teacher of the studies above (`experiments/teachers/`), sums of three numbers that neither has seen.
# The base samples one answer to each at temperature 1, and the teacher reads the very same tokens. These are the two
# distributions whose divergence on-policy distillation lowers.

# %%
task = ChainedSums(num_terms=3, highest=19)
data = TraceData(task=task, template=Plain(), num_train=8, num_val=2, num_test=200, max_tokens=48)
codec, problems = data.codec, data.problems("test")
student, teacher = (
    load_network(ROOT / "experiments" / "teachers" / folder, **data.facts()).network for folder in ("sum3_base", "sum3")
)
sampling = Sampling(num_samples=1, temperature=1.0, max_new_tokens=16, seed=3)
grader = Grader(task, codec.template, codec.layout)
graded = {}
for writer, network in (("base", student), ("teacher", teacher)):
    generator = LocalGenerator(network, codec.tokenizer, eos_ids=codec.eos_ids, pad_id=codec.pad_id)
    written = write_completions(generator, codec, codec.template, {p.index: p.text for p in problems}, sampling)
    graded[writer] = [(problem, written[problem.index][0]) for problem in problems]
    right = sum(grader.grade(*pair).correct for pair in graded[writer])
    print(f"{writer:8s} {right} of {len(problems)} sampled answers right")

# %% [markdown]
# The first rollout that is right throughout, and the first two with a wrong step. A bar is KL(student || teacher) of
# the two distributions that stood there *before* the token was drawn, in nats, on one scale; the tokens are the
# student's own. Where the teacher's likeliest token is another one, it stands below in orange. A wrong token need not
# have a high bar, if it was an unlucky draw from much the same distribution; and behind a wrong total the teacher, too,
# goes on from what stands there and not from what should. That is what no stored trace can show a student.

# %%
chosen = {}
for problem, completion in graded["base"]:
    outcome = grader.grade(problem, completion).outcome
    chosen.setdefault(outcome, []).append((problem, completion))
rollouts = [*chosen["valid_right"][:1], *chosen["wrong_step"][:2]]
distances = [token_distances(student, teacher, codec, codec, *rollout) for rollout in rollouts]
highest = max(max(found.reverse_kl) for found in distances)
figure, axes = plt.subplots(len(rollouts), 1, figsize=(6, 1.6 * len(rollouts)), layout="constrained")
for axis, (problem, _), found in zip(axes, rollouts, distances, strict=True):
    prompt = codec.decode(codec.prompt_ids(problem.text))
    options = {"prompt": prompt, "others": found.preferred, "highest": highest, "columns": 23}
    draw_tokens(axis, found.pieces, found.reverse_kl, **options)
    axis.set_title(f"should be {problem.chain}#{problem.answer}", fontsize=9, color="#777777", loc="left")
plt.show()

# %% [markdown]
# The last of them in numbers: the probability that each gives the token that stands there, and both divergences.

# %%
found = distances[-1]
print("token   student  teacher   teacher's own  KL(s || t)  KL(t || s)")
rows = zip(
    found.pieces,
    found.student_nll,
    found.teacher_nll,
    found.preferred,
    found.reverse_kl,
    found.forward_kl,
    strict=True,
)
for piece, own, its, preferred, reverse, forward in rows:
    own_prob, its_prob = torch.tensor([-own, -its]).exp().tolist()
    print(f"{piece:8s}{own_prob:7.2f}{its_prob:9.2f}   {preferred:13s}{reverse:12.2f}{forward:12.2f}")

# %% [markdown]
# ## 6. What the studies found
#
# The question of each study, its arms and the rule for its verdict (`study.yaml`) were fixed before the runs. Run one
# again with `distill study experiments/NAME`.

# %%
verdicts = {name: json.loads((FOLDERS[name] / "verdict.json").read_text()) for name in shown}
rows = [
    f"| {name} | {v['claim']} | **{v['verdict']}** | {sum(arm['n'] for arm in v['arms'].values())} |"
    for name, v in verdicts.items()
]
if shown:
    display(Markdown("\n".join(["| study | claims | verdict | runs |", "|---|---|---|--:|", *rows])))
for name in STUDIES:
    if name not in shown:
        print(f"{name}: no results are committed yet.")
for name, verdict in verdicts.items():
    for contrast, entry in verdict["secondary"].items():
        interval = "-" if entry["estimate"] is None else f"{entry['estimate']:.4g}  [{entry['low']}, {entry['high']}]"
        print(f"{name:22s} {contrast:28s} {entry['verdict']:13s} {interval} {entry['unit'] or ''}".rstrip())
