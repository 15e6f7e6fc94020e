"""distill evaluate: score a finished run again, from its folder alone; nothing about the model is typed twice.

  distill evaluate run=outputs/mnist_hard/RUN
  distill evaluate run=RUN split=val
  distill evaluate run=RUN reference=outputs/mnist_teacher/RUN      agreement and KL against another network
  distill evaluate run=RUN +data.test_shift_pixels=2                the same images, moved

The scores are printed and written beside the record, into `evaluation_<split>.json`.
"""

from typing import Any

from omegaconf import DictConfig

GROUPS = ()


def task(cfg: DictConfig) -> float:
    """Evaluate one run folder; writes `evaluation_<split>[_<key>=<value>].json` there and returns the errors."""
    import json
    import re
    from pathlib import Path

    from omegaconf import OmegaConf

    from research.config import build_data, plain
    from research.errors import ConfigError
    from research.evaluation.evaluate import evaluate
    from research.results.record import read_record
    from research.teachers.load import frozen, load_network

    if not cfg.run:
        raise ConfigError("run is not set; give the folder of a finished run: distill evaluate run=outputs/NAME/TIME")
    folder = Path(cfg.run)
    if not (folder / "run.json").exists():
        raise ConfigError(f"run is {folder}, which has no run.json; give the folder of a finished run")
    record = read_record(folder / "run.json")
    if record.status != "completed":
        raise ConfigError(f"the run {folder} is {record.status} ({record.reason}); only a completed run has a student")
    moved = plain(cfg.data)
    data = build_data(OmegaConf.create(record.config), moved)
    facts: dict[str, Any] = {"input_shape": tuple(data.input_shape), "num_classes": data.num_classes}
    student = load_network(folder, **facts).network
    teacher = frozen(cfg.reference, **facts) if cfg.reference else None
    result = evaluate(
        student,
        data.loader(cfg.split, batch_size=cfg.batch_size),
        split=cfg.split,
        num_classes=data.num_classes,
        teacher=teacher,
        temperature=float(record.config["method"].get("temperature") or 1.0),
    )
    changes = "".join(f"_{key}={value}" for key, value in sorted(moved.items()) if key != "data_dir")
    changes = re.sub(r"[^\w.=,-]+", "-", changes)  # other data, another file
    path = folder / f"evaluation_{cfg.split}{changes}.json"
    told = {
        "run": record.config_hash,
        "data": moved,
        "metrics": result.metrics,
        "omitted": result.omitted,
    }
    path.write_text(json.dumps(told, indent=1) + "\n")
    for name, value in result.metrics.items():
        print(f"{name:40s} {value:.6g}")
    for name, reason in result.omitted.items():
        print(f"{name:40s} omitted: {reason}")
    print(f"written: {path}")
    return result.metrics[f"{cfg.split}/errors"]
