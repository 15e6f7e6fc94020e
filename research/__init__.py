"""Knowledge distillation as a research framework: soft targets, traces, on-policy, and what they are measured against."""
