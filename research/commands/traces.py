"""distill traces: a teacher writes its reasoning out; verified, filtered and stored, every drop counted by reason.

  distill traces task=sum5 teacher.path=outputs/teacher/RUN sampling.num_samples=4 store=outputs/stores/sum5
  distill traces task=sum5 teacher.path=RUN filter=step_verifier data.num_problems=4000
  distill traces task=sum5 teacher.path=RUN 'filters=[{name: answer_key}, {name: length, max_tokens: 40}]'
  distill traces task=gsm8k template=think generator=server generator.base_url=http://127.0.0.1:8000/v1
  distill traces source=reference task=sum5 template=plain '+corruption.compensating_pair=0.5'
  distill traces source=file data.file=traces.jsonl filter=none
  distill traces source=released data.file=svamp_palm540b data.split=all filter=step_verifier

The store holds parquet shards, a manifest with the settings, hashes and the drop ledger, the run record, and
explorer.html. A killed run goes on with the same command and store: no row is lost or doubled. Train on it with
`distill train data=traces data.store=STORE`.
"""

from omegaconf import DictConfig

GROUPS = ("task", "template", "generator", "filter")


def task(cfg: DictConfig) -> None:
    """Write one store and print its drop ledger."""
    from research.sweeps.traces_job import traces_job
    from research.traces.manifest import read_manifest

    folder = traces_job(cfg, show_progress=True)
    tally = read_manifest(folder).tally
    print(f"{tally.kept} of {tally.written} traces kept, {tally.problems} problems, in {folder}")
    for reason, number in tally.dropped.items():
        print(f"  dropped by {reason:24s} {number}")
    print(f"record: {folder}/run.json")
