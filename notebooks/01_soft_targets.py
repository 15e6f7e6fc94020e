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
# # Soft targets
#
# What a temperature does to a teacher's distribution, why the soft term is multiplied by $T^2$, and what six studies
# found. The first two sections compute; the third only reads the records that are committed under `experiments/`.
# Nothing is defined here: every quantity comes from the package.

# %%
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, Markdown, display

from research.losses.soft_target import soft_target
from research.records import DenseLogits
from research.results.terminal import study_table, verdict_line
from research.seeding import rng_for

ROOT = Path.cwd() if (Path.cwd() / "experiments").is_dir() else Path.cwd().parent

# %% [markdown]
# ## 1. Dark knowledge: a BMW, a garbage truck, a carrot (claim C01)
#
# Four invented logits for a picture of a BMW. At $T = 1$ the wrong classes are there but invisible: the garbage truck
# has $6 \times 10^{-16}$, and still $3.6 \times 10^9$ times the carrot. Softening does not pull the wrong classes
# apart: their ratio is $\exp(\Delta z / T)$ and *falls* with $T$. What grows is their absolute share, so that a
# student gets a gradient from it.

# %%
names = ["BMW", "garbage truck", "carrot", "sofa"]
logits_V = torch.tensor([60.0, 25.0, 3.0, -3.0], dtype=torch.float64)
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), sharey=True, layout="constrained")
for axis, temperature in zip(axes, (1, 6, 20), strict=True):
    probs_V = torch.softmax(logits_V / temperature, dim=-1)
    entropy = float(torch.special.entr(probs_V).sum())
    axis.barh(names, probs_V, color=["#0072B2", "#E69F00", "#D55E00", "#009E73"])
    axis.set(xscale="log", xlim=(1e-30, 100), title=f"T = {temperature}, entropy {entropy:.3f} nats")
    for row, prob in enumerate(probs_V):
        axis.text(float(prob) * 2, row, f"{float(prob):.2g}", va="center", fontsize=8)
axes[0].invert_yaxis()
figure.supxlabel("probability (log scale)", fontsize=9)
plt.show()

# %%
for temperature in (1, 6, 20):
    probs_V = torch.softmax(logits_V / temperature, dim=-1)
    ratio, law = float(probs_V[1] / probs_V[2]), math.exp((25 - 3) / temperature)
    print(f"T = {temperature:2d}   truck : carrot = {ratio:.3g}   exp(22 / T) = {law:.3g}")

# %% [markdown]
# ## 2. The $T^2$ law (claim C02)
#
# The gradient of the softened divergence in the student's logits is $(q - p)/T$, and $q - p$ itself shrinks as $1/T$.
# Below: the norm of the gradient of KL(teacher || student) on random logits (10 classes, standard deviation 3), with
# and without the factor. Without it the soft term fades as $T^{-2}$, and a sweep over $T$ is a sweep over the hard/soft
# balance as well. With it the norm settles; it is *not* constant at small $T$.

# %%
temperatures = [2.0**k for k in range(11)]
generator = rng_for(0, "notebook/t_squared")
student_NV = 3 * torch.randn(256, 10, dtype=torch.float64, generator=generator)
teacher_NV = 3 * torch.randn(256, 10, dtype=torch.float64, generator=generator)
norms = {True: [], False: []}
for scaled in norms:
    for temperature in temperatures:
        leaf_NV = student_NV.clone().requires_grad_()
        signal = DenseLogits(teacher_NV)
        soft_target(leaf_NV, signal, temperature=temperature, scale_by_temperature_squared=scaled).mean().backward()
        norms[scaled].append(float(leaf_NV.grad.norm()))
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
axis.loglog(temperatures, norms[False], "o-", color="#D55E00")
axis.loglog(temperatures, norms[True], "o-", color="#0072B2")
axis.text(temperatures[-1], norms[True][-1] * 1.3, "with $T^2$", color="#0072B2", ha="right")
axis.text(temperatures[-1], norms[False][-1] * 6, "without", color="#D55E00", ha="right")
axis.set(
    xlabel="temperature", ylabel="gradient norm", title="The soft term keeps its weight only with the factor $T^2$"
)
plt.show()
slope = (
    torch.tensor(norms[False][-1] / norms[False][-4]).log() / torch.tensor(temperatures[-1] / temperatures[-4]).log()
)
print(f"slope of log norm on log T without the factor, at large T: {float(slope):.3f} (law: -2)")

# %% [markdown]
# ## 3. What the studies found
#
# Each study is a folder: the question and the rule for its verdict (`study.yaml`) were fixed before the runs. Rebuild
# any of them with `distill report experiments/NAME`, and run it again with `distill study experiments/NAME`.

# %%
STUDIES = [
    "mnist_soft_targets",
    "mnist_temperature_width",
    "mnist_missing_digit",
    "mnist_few_labels",
    "logit_matching",
    "speech_ensemble",
]
verdicts = {name: json.loads((ROOT / "experiments" / name / "verdict.json").read_text()) for name in STUDIES}
rows = [
    f"| {name} | {v['claim']} | **{v['verdict']}** | {sum(arm['n'] for arm in v['arms'].values())} |"
    for name, v in verdicts.items()
]
display(Markdown("\n".join(["| study | claims | verdict | runs |", "|---|---|---|--:|", *rows])))

# %%
for name in STUDIES:
    folder = ROOT / "experiments" / name
    display(Markdown(f"### {name}\n\n{verdict_line(folder)}"))
    display(Image(str(folder / "figure.png"), width=900))
    print(study_table(folder))

# %% [markdown]
# The secondary comparisons, with their intervals and what they say of the published numbers, stand in each study's
# README.

# %%
for name, verdict in verdicts.items():
    for contrast, entry in verdict["secondary"].items():
        interval = "-" if entry["estimate"] is None else f"{entry['estimate']:.4g}  [{entry['low']}, {entry['high']}]"
        print(f"{name:24s} {contrast:36s} {entry['verdict']:13s} {interval}")
