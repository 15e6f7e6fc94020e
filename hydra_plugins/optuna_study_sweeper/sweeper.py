"""Hydra's sweeper plugin; what it does is in `research.sweeps`. Imports no Optuna: Hydra imports every plugin."""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.optuna_study_sweeper import config as _config  # noqa: F401  registers the groups


class OptunaStudySweeper(Sweeper):
    """`hydra/sweeper=optuna_study`: see `OptunaStudyConf` for the keywords."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.config: DictConfig | None = None
        self.launcher: Any = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Sweep over what the overrides and `hydra.sweeper.params` search; returns Hydra's job returns by launch.

        Raises, after the report, where trials ended and none was completed: ConfigError, or an application's own error.
        """
        from research.sweeps.sweep_command import refuse_fruitless, sweep
        from research.sweeps.sweep_options import normalised

        assert self.config is not None and self.hydra_context is not None and self.task_function is not None
        options = normalised(self.options)
        returns, store = sweep(options, arguments, self.hydra_context, self.task_function, self.config, self._launcher)
        refuse_fruitless(store, returns)
        return returns

    def _launcher(self, task: TaskFunction, config: DictConfig) -> Any:
        return Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context,  # type: ignore[arg-type]
            task_function=task,
            config=config,
        )
