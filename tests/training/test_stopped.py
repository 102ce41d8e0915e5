"""A run stopped at any moment and resumed ends with the weights of the run that was not.

Real `fit` processes get real signals; nothing is simulated.
"""

import random
import shutil
import signal
import time

import pytest
import torch

from tests.training.fit_processes import (
    assert_bitwise_equal,
    fit_arguments,
    run_fit,
    weights_of,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "every"),
    # Asked to stop, the run writes its checkpoint itself; the first is only there to start the
    # clock.
    [(signal.SIGKILL, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)],
    ids=["kill -9", "SIGTERM", "Ctrl-C"],
)
def test_stopped_at_random_moments(workplace, uninterrupted, tmp_path, signum, every):
    expected, seconds, _ = uninterrupted
    rng = random.Random(time.time_ns())
    # Kills come at any moment, the very end included; a signal finds the run alive more often.
    wanted, span = (6, seconds) if signum == signal.SIGKILL else (2, 0.7 * seconds)
    stopped_at: list[int] = []
    runs = 0
    while len(stopped_at) < wanted:
        run = tmp_path / str(runs)
        run.mkdir()
        runs += 1
        arguments = fit_arguments(workplace, run, every)
        moment = rng.uniform(0, span)
        if run_fit(arguments, run, kill_after=moment, signum=signum) is None:
            stopped_at.append(torch.load(run / "last.ckpt", weights_only=True)["global_step"])
            resume = tmp_path / f"{runs}-resume.ckpt"
            shutil.copy(run / "last.ckpt", resume)
            run_fit([*arguments, f"--ckpt_path={resume}"], run)
        else:
            span *= 0.8  # the machine has become faster
        assert_bitwise_equal(weights_of(run / "last.ckpt"), expected)
    print(f"{runs} of {runs} runs bitwise equal, {wanted} of them stopped, at steps {stopped_at}")
