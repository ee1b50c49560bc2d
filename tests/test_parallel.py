"""Several processes do what one does: losses, gradients, steps, checkpoints; and what happens when one of them dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import loading
import train

ROOT = Path(__file__).resolve().parent.parent


def processes(n: int, *words: object, fails: bool = False) -> subprocess.CompletedProcess:
    """tests/processes.py under torchrun, or, of one, as it is."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run([sys.executable, *(torchrun if n > 1 else []), str(ROOT / "tests/processes.py"), *map(str, words)], cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert fails or done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_do_what_one_does():
    """Apart (FSDP2) and on the same batch (context parallel), two processes have the loss, the gradients, the norms of the parts
    and the step of one: with pictures in uneven numbers, with text alone on one, with a temporal module, with fewer key heads than
    processes, with activations computed again."""
    processes(2, "equal")


def test_a_checkpoint_is_read_by_another_number_of_processes(tmp_path):
    """Written by two processes, read and written by one, read by two: parameters, moments and the next loss stay the same."""
    a, b, c = (json.loads(processes(n, "resize", tmp_path / source, tmp_path / target).stdout) for n, source, target in
               ((2, "none", "a"), (1, "a", "b"), (2, "b", "c")))
    assert a == pytest.approx(b, rel=1e-6) and a == pytest.approx(c, rel=1e-6)
    assert (tmp_path / "a/checkpoint/shards").is_dir() and not (tmp_path / "b/checkpoint/shards").exists()


def test_a_process_that_dies_stops_the_run_and_the_run_goes_on(tmp_path):
    """Process 1 of two ends in the third step: process 0 says so in one line, nothing hangs, and the last checkpoint is gone on from
    by two processes, which come to the same numbers as a run that nobody died in, and by one."""
    words = ("--steps", "4", "--save-every", "2", "--out")
    died = processes(2, "train", 3, *words, tmp_path / "run", fails=True)
    lines = [line for line in died.stderr.splitlines() if line.startswith("train.py")]
    assert died.returncode and len(lines) == 1 and "another process has gone" in lines[0] and "--resume" in lines[0], died.stderr[-3000:]
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/checkpoint").symlink_to(tmp_path / "run/checkpoint")
    processes(2, "train", 0, *words, tmp_path / "run", "--resume")
    processes(2, "train", 0, *words, tmp_path / "whole")
    losses = lambda name: [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert losses("run") == pytest.approx(losses("whole"), rel=1e-6) and len(losses("run")) == 4


def test_loaders_are_shared_out_without_loss():
    """What three loaders have not yet taken comes exactly once among any number of loaders after them."""
    states = [{"next": [30], "pool": [3, 9]}, {"next": [13], "pool": []}, {"next": [26], "pool": [20, 23]}]
    left = {3, 9, 20, 23} | {n for n in range(100) if n >= states[n % 3]["next"][0]}
    for world in (1, 2, 3, 5):
        numbers = []
        for rank in range(world):
            state = loading.shared_out(states, rank, world)
            numbers += [*state["pool"], *range(state["next"][0], 100, world)]
        assert sorted(numbers) == sorted(left)
    assert loading.shared_out(states, 1, 3) == states[1]


@pytest.mark.parametrize("words, complaint", [
    (["--context-parallel", "2"], "--context-parallel 2 needs as many processes"),
    (["--accumulate", "3"], "cannot be cut into 3 parts"),
])
def test_a_wrong_number_of_processes_is_one_line(words, complaint, tmp_path, capsys):
    """What cannot be shared out ends in one line that names the option."""
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", "2", "--init", str(ROOT / "assets/tiny"), "--out", str(tmp_path / "run"), *words])
    assert end.value.code == 2 and complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
