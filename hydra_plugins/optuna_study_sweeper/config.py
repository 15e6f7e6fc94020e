"""The config groups of the sweeper: itself, its samplers, pruners and storages. Imports no Optuna.

They are named study_sampler, study_pruner and study_storage, since `hydra/sweeper/sampler` belongs to Hydra's own
Optuna plugin, which may be installed beside this one; in the config they are hydra.sweeper.sampler, pruner, storage.

Every setting of a sampler is written out, so that another version's default changes no search.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass
class TpeSampler:
    """`group` null: on where some parameters are conditional, which `multivariate` needs."""

    name: str = "tpe"
    seed: int | None = 0
    n_startup_trials: int = 10
    n_ei_candidates: int = 24
    multivariate: bool = True
    group: bool | None = None
    constant_liar: bool = True


@dataclass
class RandomSampler:
    """The control of any other one: what a search file sets for that one may stand, and is not used."""

    name: str = "random"
    seed: int | None = 0


@dataclass
class GpSampler:
    name: str = "gp"
    seed: int | None = 0
    n_startup_trials: int = 10
    deterministic_objective: bool = False
    warn_independent_sampling: bool = False


@dataclass
class CmaEsSampler:
    name: str = "cmaes"
    seed: int | None = 0
    sigma0: float | None = None
    n_startup_trials: int = 1
    consider_pruned_trials: bool = False
    popsize: int | None = None
    use_separable_cma: bool = False
    with_margin: bool = True
    lr_adapt: bool = False
    warn_independent_sampling: bool = False


@dataclass
class QmcSampler:
    name: str = "qmc"
    seed: int | None = 0
    qmc_type: str = "sobol"
    scramble: bool = True
    warn_asynchronous_seeding: bool = False
    warn_independent_sampling: bool = False


@dataclass
class GridSampler:
    """Every point of a discrete space once, in the order of the parameters, the last one varying fastest."""

    name: str = "grid"
    seed: int | None = None


@dataclass
class BruteForceSampler:
    """Every point of a discrete space once, in random order."""

    name: str = "brute_force"
    seed: int | None = 0
    avoid_premature_stop: bool = True


@dataclass
class NsgaiiSampler:
    name: str = "nsgaii"
    seed: int | None = 0
    population_size: int = 50
    mutation_prob: float | None = None
    crossover_prob: float = 0.9
    swapping_prob: float = 0.5


@dataclass
class NsgaiiiSampler:
    name: str = "nsgaiii"
    seed: int | None = 0
    population_size: int = 50
    mutation_prob: float | None = None
    crossover_prob: float = 0.9
    swapping_prob: float = 0.5
    dividing_parameter: int = 3


@dataclass
class NoPruner:
    """What a search file sets for another pruner may stand, and is not used."""

    name: str = "none"


@dataclass
class MedianPruner:
    name: str = "median"
    n_startup_trials: int = 5
    n_warmup_steps: int = 0
    interval_steps: int = 1
    n_min_trials: int = 1


@dataclass
class PercentilePruner:
    name: str = "percentile"
    percentile: float = 25.0
    n_startup_trials: int = 5
    n_warmup_steps: int = 0
    interval_steps: int = 1
    n_min_trials: int = 1


@dataclass
class SuccessiveHalvingPruner:
    """`min_resource` in the units of the reported steps, or auto."""

    name: str = "successive_halving"
    min_resource: Any = "auto"
    reduction_factor: int = 4
    min_early_stopping_rate: int = 0
    bootstrap_count: int = 0


@dataclass
class HyperbandPruner:
    name: str = "hyperband"
    min_resource: int = 1
    max_resource: Any = "auto"
    reduction_factor: int = 3
    bootstrap_count: int = 0


@dataclass
class PatientPruner:
    """Prunes what `wrapped`, another pruner's settings, would prune, after `patience` steps without improvement."""

    name: str = "patient"
    patience: int = 5
    min_delta: float = 0.0
    wrapped: Any = None


@dataclass
class ThresholdPruner:
    name: str = "threshold"
    lower: float | None = None
    upper: float | None = None
    n_warmup_steps: int = 0
    interval_steps: int = 1


@dataclass
class WilcoxonPruner:
    """Compares trials seed by seed: needs `seeds`."""

    name: str = "wilcoxon"
    p_threshold: float = 0.1
    n_startup_steps: int = 2


@dataclass
class JournalStorage:
    """An append-only file; null: study.journal in the sweep's folder."""

    name: str = "journal"
    path: str | None = None


@dataclass
class JournalRedisStorage:
    """The same in a Redis server, its URL without the password; all its keys begin with `prefix`."""

    name: str = "journal_redis"
    url: str | None = None
    prefix: str = ""


@dataclass
class RdbStorage:
    """A database by SQLAlchemy's URL, without its password: `engine` goes to create_engine."""

    name: str = "rdb"
    url: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass
class GrpcStorage:
    name: str = "grpc"
    host: str = "localhost"
    port: int = 13000


@dataclass
class MemoryStorage:
    """Of this process alone: nothing is left to resume."""

    name: str = "memory"


@dataclass
class OptunaStudyConf:
    """`hydra/sweeper=optuna_study`. Mappings are null where they are empty: so a command line can give them whole.

    study_name    of the study, and of the folder where the application's config says so; null: the sweep folder's name
    direction     minimize or maximize, or a list of them
    objectives    name of a returned metric -> direction: for a task that returns a mapping; replaces `direction`
    constraints   name of a returned metric -> the greatest value that is feasible
    hypervolume   of two objectives: name -> [worst, best]; the share of that box which the trials dominate is reported
    n_trials      trials of the study in the end; the same command again goes on to there
    n_jobs        trials at once; null: the launcher's own n_jobs, else 1; -1: one for each core
    mode          batch: n_jobs trials are launched and waited for together; workers: n_jobs workers take trials
    params        key -> search in Hydra's grammar, or a list of values
    zipped        name -> {key: values}: values that go together
    conditional   blocks {when: {name: values}, params: {...}}
    fixed         name of a searched parameter -> the value at which it is held
    prune_on      metric of validation that runs report to the pruner; null: the objective
    prune_step    what these reports count: step (of the optimizer) or epoch
    seeds         every trial is run with each, its value is the mean; seed_key: the key that they are given to
    enqueue       points to try first
    copy_from     {storage: {...}, study_name: ...}: finished trials that the sampler shall know
    resume        auto, must, never; on_change: refuse or allow another search under the same name
    out_of_memory fail: such a trial has failed; constraint: it is infeasible, and the sampler learns to keep away
    retries       how often a failed point is tried again; max_attempts: how often an interrupted trial is begun
    max_failures, max_failure_rate, timeout, target, patience   when the sweep ends before its last trial
    subprocess    every run in a process of its own
    gpus          values of CUDA_VISIBLE_DEVICES, one for each worker in turn; null: one each where there are several
    lease_s       seconds between a trial's signs of life; after stale_s without one it counts as interrupted
    """

    defaults: list[Any] = field(
        default_factory=lambda: [
            "_self_",
            {"study_sampler": "tpe"},
            {"study_pruner": "none"},
            {"study_storage": "journal"},
        ]
    )
    _target_: str = "hydra_plugins.optuna_study_sweeper.sweeper.OptunaStudySweeper"
    study_name: str | None = None
    direction: Any = "minimize"
    objectives: Any = None
    constraints: Any = None
    hypervolume: Any = None
    n_trials: int = 20
    n_jobs: int | None = None
    mode: str = "batch"
    params: Any = None
    zipped: Any = None
    conditional: list[Any] = field(default_factory=list)
    fixed: Any = None
    prune_on: str | None = None
    prune_step: str = "step"
    seeds: list[int] = field(default_factory=list)
    seed_key: str = "seed"
    enqueue: list[Any] = field(default_factory=list)
    copy_from: Any = None
    resume: str = "auto"
    on_change: str = "refuse"
    out_of_memory: str = "fail"
    retries: int = 0
    max_attempts: int = 5
    max_failures: int | None = None
    max_failure_rate: float | None = 0.5
    timeout: float | None = None
    target: float | None = None
    patience: int | None = None
    subprocess: bool = False
    gpus: Any = None
    lease_s: float = 10.0
    stale_s: float = 60.0
    sampler: Any = None
    pruner: Any = None
    storage: Any = None


SAMPLERS = (
    TpeSampler, RandomSampler, GpSampler, CmaEsSampler, QmcSampler, GridSampler, BruteForceSampler, NsgaiiSampler,
    NsgaiiiSampler,
)  # fmt: skip
PRUNERS = (
    NoPruner, MedianPruner, PercentilePruner, SuccessiveHalvingPruner, HyperbandPruner, PatientPruner, ThresholdPruner,
    WilcoxonPruner,
)  # fmt: skip
CONTROLS = (RandomSampler, NoPruner)
STORAGES = (JournalStorage, JournalRedisStorage, RdbStorage, GrpcStorage, MemoryStorage)


def register() -> None:
    """Make the groups known to Hydra."""
    store, provider = ConfigStore.instance(), "optuna_study_sweeper"
    store.store(group="hydra/sweeper", name="optuna_study", node=OptunaStudyConf, provider=provider)
    for group, kinds in (("sampler", SAMPLERS), ("pruner", PRUNERS), ("storage", STORAGES)):
        for kind in kinds:
            name = str(kind.__dataclass_fields__["name"].default)
            node = asdict(kind()) if kind in CONTROLS else kind  # a plain mapping takes further keys
            place = {"group": f"hydra/sweeper/study_{group}", "package": f"hydra.sweeper.{group}"}
            store.store(**place, name=name, node=node, provider=provider)


register()
