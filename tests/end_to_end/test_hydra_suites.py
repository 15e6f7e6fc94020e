"""Hydra's own suites for plugins, against this sweeper: what any launcher and any application may rely on."""

from collections.abc import Iterator
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite
from hydra.version import VersionBase

from hydra_plugins.optuna_study_sweeper.sweeper import OptunaStudySweeper

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own() -> Iterator[None]:
    """Applications that earlier tests ran set a version base, on which the working folder of a job depends."""
    base, fresh = VersionBase.instance(), object.__new__(VersionBase)
    fresh.__init__()  # type: ignore[misc]
    kept, base.version_base = base.version_base, fresh.version_base
    yield
    base.version_base = kept


GRID = ["hydra/sweeper=optuna_study", "hydra/sweeper/study_sampler=grid", "hydra.sweeper.n_jobs=2"]


def test_hydra_finds_the_plugin() -> None:
    assert OptunaStudySweeper.__name__ in [found.__name__ for found in Plugins.instance().discover(Sweeper)]


# a batch is one launch: with submitit two jobs at once, each in a process that reads its task from a pickle
JOBLIB = pytest.param("joblib", [*GRID, "hydra.launcher.n_jobs=2"], marks=pytest.mark.slow)
SUBMITIT = pytest.param("submitit_local", [*GRID, "hydra.launcher.timeout_min=5"], marks=pytest.mark.slow)


@pytest.mark.parametrize(("launcher_name", "overrides"), [("basic", GRID), JOBLIB, SUBMITIT])
class TestLaunchers(LauncherTestSuite):
    """One job, two jobs, groups, mandatory choices, resolvers, hydra's own overrides."""


@pytest.mark.parametrize(("launcher_name", "overrides"), [("basic", GRID), JOBLIB, SUBMITIT])
class TestBatches(BatchedSweeperTestSuite):
    """Six jobs in three batches of two, in order, each in its folder."""


# in memory: one of these tests sweeps the same folder twice, which is a resume with nothing left to do
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({}, ["-m", "hydra/launcher=basic", "hydra/sweeper/study_storage=memory", *GRID])],
)
class TestIntegration(IntegrationTestSuite):
    """Task names, working folders and paths, in a process of their own."""


@pytest.mark.slow
@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=submitit_local", *GRID])])
class TestIntegrationOfJobs(IntegrationTestSuite):
    """The same where every trial is a job of a cluster's launcher, and memory is no storage."""

    test_to_absolute_path_multirun = None  # sweeps one folder twice


def test_the_suites_are_not_empty() -> None:
    kept: list[Any] = [TestLaunchers, TestBatches, TestIntegration, TestIntegrationOfJobs]
    assert all(any(name.startswith("test_") for name in dir(suite)) for suite in kept)
