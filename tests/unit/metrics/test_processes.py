"""The own metrics over two real gloo processes with uneven shares: every process has the value of the whole."""

import json
import os
import subprocess
import sys

import pytest
import torch

from research.losses.divergences import forward_kl
from research.metrics.calibration import EqualMassCalibrationError, ExpectedCalibrationError
from research.metrics.classification import Errors, NegativeLogLikelihood
from research.metrics.fidelity import AgreementAtK, ErrorCopying, MeanDivergence

PROCESS = """
import json, sys
import torch
import torch.distributed as dist
from research.losses.divergences import forward_kl
from research.metrics.calibration import EqualMassCalibrationError, ExpectedCalibrationError
from research.metrics.classification import Errors, NegativeLogLikelihood
from research.metrics.fidelity import AgreementAtK, ErrorCopying, MeanDivergence

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
student_NV, teacher_NV, label_N = torch.load(f"{folder}/items.pt", weights_only=True)
rows = slice(0, 23) if rank == 0 else slice(23, None)
student_NV, teacher_NV, label_N = student_NV[rows], teacher_NV[rows], label_N[rows]
teacher_N = teacher_NV.argmax(-1)
values = {}
for metric, tensors in (
    (NegativeLogLikelihood(), (student_NV, label_N)),
    (Errors(), (student_NV, label_N)),
    (ExpectedCalibrationError(), (student_NV, label_N)),
    (EqualMassCalibrationError(), (student_NV, label_N)),
    (AgreementAtK(2), (student_NV, teacher_N)),
    (ErrorCopying(), (student_NV, teacher_N, label_N)),
    (MeanDivergence(forward_kl), (student_NV, teacher_NV)),
):
    metric.update(*tensors)
    values[type(metric).__name__] = float(metric.compute())
print(json.dumps(values))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_value_of_the_whole(tmp_path):
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (3 * torch.randn(2, 80, 6, generator=generator)).unbind(0)
    label_N = torch.randint(6, (80,), generator=generator)
    torch.save((student_NV, teacher_NV, label_N), tmp_path / "items.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(rank)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    values = [json.loads(text.splitlines()[-1]) for text in printed]
    teacher_N = teacher_NV.argmax(-1)
    expected = {}
    for metric, tensors in (
        (NegativeLogLikelihood(), (student_NV, label_N)),
        (Errors(), (student_NV, label_N)),
        (ExpectedCalibrationError(), (student_NV, label_N)),
        (EqualMassCalibrationError(), (student_NV, label_N)),
        (AgreementAtK(2), (student_NV, teacher_N)),
        (ErrorCopying(), (student_NV, teacher_N, label_N)),
        (MeanDivergence(forward_kl), (student_NV, teacher_NV)),
    ):
        metric.update(*tensors)
        expected[type(metric).__name__] = float(metric.compute())
    assert values == [pytest.approx(expected, rel=1e-13)] * 2
