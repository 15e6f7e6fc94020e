"""distill evaluate: score a finished run again, from its folder alone; nothing about the model is typed twice.

  distill evaluate run=outputs/mnist_hard/RUN
  distill evaluate run=RUN split=val
  distill evaluate run=RUN reference=outputs/mnist_teacher/RUN      agreement and KL against another network
  distill evaluate run=RUN +data.test_shift_pixels=2                the same images, moved
  distill evaluate run=RUN sampling.num_samples=16 sampling.sampling_temperature=0.8      text: pass@k and votes
  distill evaluate run=RUN +data.task.num_terms=8                   text: longer problems than it was trained on
  distill evaluate run=RUN preflight=true                           text: the student beside the run's own teacher
  distill evaluate run=RUN preflight=true reference=outputs/teacher/RUN      or beside another: do they fit?
  distill evaluate run=RUN preflight=true teacher=served teacher.base_url=http://127.0.0.1:8000/v1 teacher.model=NAME

The scores are printed and written beside the record, into `evaluation_<split>.json`; a preflight into `preflight.json`.
"""

from omegaconf import DictConfig

GROUPS = ("teacher",)


def task(cfg: DictConfig) -> float:
    """Evaluate one run folder; writes `evaluation_<split>[_<key>=<value>].json` there and returns the errors."""
    import json
    import re
    from pathlib import Path

    from omegaconf import OmegaConf

    from research.config import build_data, flat_overrides, plain
    from research.data.traces import TraceData
    from research.errors import ConfigError
    from research.loops.scoring import Scores, class_scores, score_text
    from research.results.record import read_record
    from research.sweeps.preflight_job import preflight_of_run
    from research.teachers.load import NETWORK_FOLDER, frozen, load_network

    if not cfg.run:
        raise ConfigError("run is not set; give the folder of a finished run: distill evaluate run=outputs/NAME/TIME")
    folder = Path(cfg.run)
    if not (folder / "run.json").exists():
        raise ConfigError(f"run is {folder}, which has no run.json; give the folder of a finished run")
    record = read_record(folder / "run.json")
    if record.status != "completed":
        raise ConfigError(f"the run {folder} is {record.status} ({record.reason}); only a completed run has a student")
    moved = flat_overrides(plain(cfg.data))
    home = folder / NETWORK_FOLDER
    # the student's own tokenizer: one that was trained on a store would need the store, and texts that have not moved
    own = {"tokenizer": str(home)} if (home / "tokenizer.json").exists() else {}
    data = build_data(OmegaConf.create(record.config), {**own, **moved})
    student = load_network(folder, **data.facts()).network
    if cfg.preflight:
        return preflight_of_run(cfg, record.config, student, data, folder)
    if plain(cfg.teacher).get("_target_"):
        raise ConfigError("teacher belongs to preflight=true; to compare with another network give reference=FOLDER")
    changes = "".join(f"_{key}={value}" for key, value in sorted(moved.items()) if key != "data_dir")
    changes = re.sub(r"[^\w.=,-]+", "-", changes)  # other data, another file
    if isinstance(data, TraceData):
        if cfg.reference:
            raise ConfigError("reference compares classes; what a student writes is graded by its task: leave it out")
        limit = cfg.sampling.max_new_tokens or record.config["evaluation"].get("max_new_tokens")  # the run's own
        options = {**plain(cfg.sampling), "max_new_tokens": limit, "splits": [cfg.split]}
        scores: Scores = score_text(student, data, {}, options, folder / f"evaluation_{cfg.split}{changes}", cfg.seed)
    else:
        teacher = frozen(cfg.reference, **data.facts()) if cfg.reference else None
        temperature = float(record.config["method"].get("temperature") or 1.0)
        scores = class_scores(student, data, cfg.split, cfg.batch_size, teacher, temperature)
    path = folder / f"evaluation_{cfg.split}{changes}.json"
    told = {"run": record.config_hash, "data": moved, "metrics": scores.metrics, "omitted": scores.omitted}
    if isinstance(data, TraceData):
        told["sampling"] = {name: value for name, value in options.items() if name != "splits"}
    path.write_text(json.dumps(told, indent=1) + "\n")
    for reason in dict.fromkeys(scores.omitted.values()):
        names = ", ".join(name for name, why in scores.omitted.items() if why == reason)
        print(f"omitted ({reason}): {names}")
    for name, value in scores.metrics.items():
        print(f"{name:40s} {value:.6g}")
    print(f"written: {path}")
    return scores.metrics[f"{cfg.split}/errors"]
