"""distill cache: score a split once with a teacher and write the signals to disk.

  distill cache data=mnist teacher.path=outputs/mnist_teacher/RUN cache_dir=outputs/caches/mnist
  distill cache data=mnist teacher.path=RUN top_k=3 dtype=float16
  distill cache data=spoken_digits teacher=ensemble 'teacher.paths=[RUN_A,RUN_B]' teacher.mean=geometric

A killed cache goes on with the same command and cache_dir. The manifest holds the fingerprint that `teacher=cached`
checks, and the measured KL between the teacher and what the cache gives back.
"""

from omegaconf import DictConfig

GROUPS = ("data", "teacher")


def task(cfg: DictConfig) -> None:
    """Write one cache."""
    from research.sweeps.cache_job import cache_job
    from research.teachers.cache import read_manifest

    folder = cache_job(cfg, show_progress=True)
    manifest = read_manifest(folder)
    gap = ", ".join(f"T={temperature}: {value:.2e}" for temperature, value in manifest.kl_gap.items())
    print(f"{manifest.rows} rows in {folder}\nKL(teacher || cache) in nats: {gap}")
