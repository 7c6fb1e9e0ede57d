"""`accelerate launch` with two processes: a plain loop, and EngramTrainer, equal one process with the doubled batch.

Run: pytest tests/integration/test_processes_launch.py
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .launched import MAX_NORM, loop, trainer
from .process_models import assert_close, assert_same, small_model, weights


ROOT = Path(__file__).parents[2]
CLOSE = 1e-6  # sums of float32 in another order
PATIENCE = 120  # seconds; about 12 on a quiet machine, most of them imports


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> list[dict]:
    """What each process left."""
    folder = tmp_path_factory.mktemp("launched")
    # `--cpu` starts one process (or needs mpirun): `--multi_gpu` is torchrun's launcher, and the script says cpu=True.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--module", "tests.integration.launched", str(folder)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "GLOO_SOCKET_IFNAME": "lo"}
    # A session of its own, so that the launcher's children end with it.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, said[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_plain_loop_on_accelerate_equals_one_process(launched):
    alone, norms = loop(4)
    first, second = launched
    assert first["count"] == second["count"] == 2, "control: there were two processes"
    assert_same(first["loop"], second["loop"])
    assert_close(first["loop"], alone, CLOSE)
    assert first["norms"] == second["norms"]
    assert first["norms"] == pytest.approx(norms, rel=1e-5)  # torch rounds norms
    assert min(norms) > MAX_NORM, "control: gradients were clipped"


def test_engram_trainer_equals_one_process(launched, tmp_path):
    alone = trainer(4, str(tmp_path))
    alone.train()
    first, second = launched
    assert_same(first["trainer"], second["trainer"])
    assert_close(first["trainer"], weights(alone.model), CLOSE)
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert first["losses"] == pytest.approx(losses, abs=1e-4)  # Trainer rounds to four places
    before = weights(small_model())
    assert all(not torch.equal(first["trainer"][name], before[name]) for name in before if ".tables." in name)
