"""Ratchets: what users and committed results rely on. A new name here is a decision, so the list changes on purpose."""

import dataclasses

from research.commands.main import COMMANDS
from research.evaluation.evaluate import ITEM_COLUMNS, METRIC_NAMES
from research.evaluation.sequences import GREEDY_NAMES, SAMPLED_ITEM_COLUMNS, SAMPLED_NAMES, SEQUENCE_ITEM_COLUMNS
from research.evaluation.token_loss import TOKEN_METRIC_NAMES
from research.loops.self_taught import ITERATION_KEYS
from research.losses.divergences import DIVERGENCES
from research.records import Verdict
from research.results.record import LEDGER_FIELDS, LEDGER_PARTS, RECORD_KEYS, SCHEMA_VERSION, STATUSES
from research.results.report import VERDICT_KEYS
from research.results.study_file import STUDY_KEYS
from research.schemas import SCHEMAS, EvaluationConfig
from research.text.formats import TRACE_FORMATS

ROOT_KEYS = {
    "train": {
        "name", "seed", "data", "task", "template", "student", "teacher", "reference", "signal_transform", "method",
        "optimizer", "scheduler", "loop", "trainer", "logger", "paths", "evaluation", "ckpt_path", "monitor", "compile",
        "threads", "keep_checkpoints", "tags", "budget", "checkpoint_steps", "init_from", "teacher_template",
        "preflight", "preflight_problems", "teacher_cache", "early_stopping",
    },
    "cache": {
        "name", "seed", "data", "teacher", "paths", "cache_dir", "split", "top_k", "dtype", "shard_rows", "threads",
    },
    "evaluate": {
        "name", "seed", "run", "split", "data", "reference", "batch_size", "sampling", "preflight",
        "preflight_problems", "teacher", "paths",
    },
    "traces": {
        "name", "seed", "source", "task", "template", "teacher", "generator", "data", "sampling", "filters",
        "corruption", "store", "keep_dropped", "block_problems", "explorer", "paths", "threads",
    },
    "convert": {"name", "source", "format", "output", "paths"},
    "study": {"name", "folder", "preset", "overrides", "runs_dir", "report", "paths"},
    "report": {"name", "folder", "preset", "paths"},
}  # fmt: skip


def keys_of(schema: type) -> set[str]:
    return {field.name for field in dataclasses.fields(schema)}


def test_p124_commands() -> None:
    assert COMMANDS == ("train", "cache", "traces", "evaluate", "convert", "study", "report")
    assert set(SCHEMAS) == set(COMMANDS)


def test_p124_root_keys_of_every_command() -> None:
    assert {command: keys_of(schema) for command, schema in SCHEMAS.items()} == ROOT_KEYS
    assert keys_of(EvaluationConfig) == {
        "splits", "variants", "bias_classes", "weights", "batch_size", "num_samples", "sampling_temperature", "top_p",
        "max_new_tokens", "val_problems", "val_samples", "exposure",
    }  # fmt: skip


def test_run_record_schema() -> None:
    """A changed key needs a new SCHEMA_VERSION: older run.json files would no longer be read."""
    assert SCHEMA_VERSION == 2
    assert RECORD_KEYS == (
        "schema", "command", "experiment", "status", "reason", "seed", "config", "config_hash", "overrides",
        "versions", "revision", "hardware", "started_at", "wall_s", "metrics", "ledger", "data", "student",
        "teacher", "artifacts",
    )  # fmt: skip
    assert STATUSES == ("completed", "failed", "preempted", "pruned")
    assert LEDGER_PARTS == ("student_update", "teacher_scoring", "teacher_training", "rollout", "prompt_prefill")
    assert LEDGER_FIELDS == ("flops", "tokens", "seconds")


def test_metric_names() -> None:
    assert METRIC_NAMES == (
        "errors", "accuracy", "nll", "brier", "ece", "ece_equal_mass", "fitted_temperature", "nll_scaled",
        "ece_scaled", "teacher_errors", "agreement_at_1", "agreement_at_5", "error_copying", "kl_teacher_student",
        "kl_student_teacher", "kl_teacher_student_at_temperature", "kl_student_teacher_at_temperature", "jsd",
        "total_variation", "wrong_class_spearman", "wrong_class_spearman_items", "centred_logit_mse", "teacher_nll",
        "teacher_ece", "kl_teacher_student_top_k", "kl_student_teacher_top_k",
    )  # fmt: skip
    assert ITEM_COLUMNS == ("index", "label", "prediction", "nll", "max_prob", "teacher_prediction")


def test_metric_names_of_sequences() -> None:
    answers = (
        "problems", "gold_unreadable", "unparsed", "truncated", "timeout", "repetition", "tokens_per_answer",
        "regurgitation",
    )  # fmt: skip
    chains = (
        "step_validity", "chain_valid", "process_valid_pass_at_1", "invalid_given_right", "chain_answer_agreement",
    )  # fmt: skip
    outcomes = (
        "outcome_no_chain", "outcome_unchecked", "outcome_valid_right", "outcome_lucky_answer",
        "outcome_unused_chain", "outcome_wrong_step", "outcome_skipped_step", "outcome_valid_wrong",
    )  # fmt: skip
    assert ("accuracy", "errors", *answers, *chains, *outcomes) == GREEDY_NAMES
    assert ("sampled_pass_at_1", *(f"sampled_{name}" for name in (*answers, *chains, *outcomes))) == SAMPLED_NAMES
    assert TOKEN_METRIC_NAMES == (
        "loss", "nll", "perplexity", "token_accuracy", "completion_tokens", "prompt_nll", "prompt_tokens",
    )  # fmt: skip
    assert SEQUENCE_ITEM_COLUMNS == (
        "index", "label", "prediction", "verdict", "answer", "gold", "completion", "tokens", "stop", "chain_valid",
        "num_steps", "num_valid", "outcome", "level",
    )  # fmt: skip
    assert SAMPLED_ITEM_COLUMNS == ("num_samples", "num_right")
    assert ITERATION_KEYS == (
        "iteration", "steps", "init", "init_sha256", "writer_sha256", "student_sha256", "num_problems", "fates",
        "first_try", "hinted_try", "false_positives", "writer_accuracy", "by_level", "documents", "tokens", "metrics",
        "stopped", "seconds",
    )  # fmt: skip


def test_trace_formats_and_verdicts() -> None:
    assert tuple(TRACE_FORMATS) == (
        "chain_then_answer", "answer_then_chain", "answer_only", "filler_then_answer", "shuffled_chain",
        "swapped_chain",
    )  # fmt: skip
    assert [verdict.value for verdict in Verdict] == ["correct", "wrong", "unparsed", "truncated", "timeout"]


def test_divergence_names() -> None:
    assert tuple(DIVERGENCES) == (
        "forward_kl", "reverse_kl", "jsd", "normalised_jsd", "skewed_forward_kl", "skewed_reverse_kl",
        "total_variation",
    )  # fmt: skip


def test_study_and_verdict_keys() -> None:
    assert STUDY_KEYS == (
        "study", "claim", "question", "base", "requires", "arms", "factors", "seeds", "metric", "lower_is_better",
        "comparison", "secondary", "published", "budget", "presets", "curves", "command",
    )  # fmt: skip
    assert VERDICT_KEYS == (
        "study", "claim", "verdict", "reason", "metric", "arms", "requires", "comparison", "secondary", "published",
        "command", "revision", "seconds", "missing",
    )  # fmt: skip
