"""Knowledge distillation as a research framework: soft targets, controls, studies that end in a verdict."""
