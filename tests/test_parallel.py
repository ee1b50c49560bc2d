"""Several processes do what one does: losses, gradients, steps, checkpoints; and what happens when one of them dies."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

import forks
import loading
import parallel
import train
import weights
from packing import Branch, Example, Packer
from processes import check, size
from test_model import scrambled

ROOT = Path(__file__).resolve().parent.parent


class Done(NamedTuple):
    returncode: int  # of the first process that failed, or 0
    stdout: str
    stderr: str


def processes(n: int, *words: object, fails: bool = False) -> Done:
    """A check of tests/processes.py in n processes."""
    done = run(n, words)
    if "Fatal Python error: Segmentation fault" in done.stderr and "Current thread" not in done.stderr:
        # Once in a few hundred runs gloo's own thread breaks inside of malloc (NOTES, 2026-11-29): a crash in a thread that runs no
        # Python is shown, and the processes are started once more. Any other crash, and a second one, is a failure.
        warnings.warn(f"a thread of torch crashed in one of {n} processes:\n{done.stderr}", stacklevel=2)
        done = run(n, words)
    assert fails or done.returncode == 0, done.stderr
    return done


def run(n: int, words: Sequence[object]) -> Done:
    """Where there are several they meet as torchrun's do, in a store of the process that starts them. When one has failed the others have
    a minute to notice."""
    store, here = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if n > 1 else None, {}
    with tempfile.TemporaryDirectory() as folder:
        said = [[Path(folder, f"{rank} {name}") for rank in range(n)] for name in ("out", "err")]
        started = []
        for rank, (out, err) in enumerate(zip(*said)):
            if store:
                here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
                        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            started.append(forks.start(check, *words, out=out, err=err, environment=here))
        patience = time.time() + 300
        while any(one.is_alive() for one in started) and time.time() < patience:
            wait([one.sentinel for one in started if one.is_alive()], timeout=1)
            if any(one.exitcode for one in started):
                patience = min(patience, time.time() + 60)
        for one in started:
            one.kill()
            one.join()
        codes = [one.exitcode for one in started]
        return Done(next(filter(None, codes), 0), *("".join(file.read_text() for file in files) for files in said))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["naming" if line["step"] < 0 else "loss"] for line in lines(folder) if "stills f1" not in line]


SHORT = ("--steps", "4", "--save-every", "2", "--out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two processes, two steps of the ViT alone and four of the model in shards, that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    processes(2, "train", "shards", 2, 0, *SHORT, folder)
    return folder


def test_two_processes_do_what_one_does():
    """Apart (FSDP2) and on the same batch (context parallel), two processes have the loss, the gradients, the norms of the parts
    and the step of one: in shards and whole, with pictures in uneven numbers, with text alone on one, with a temporal module, with
    fewer key heads than processes, with activations computed again; in float64 to a millionth, in float32 to 1e-5."""
    processes(2, "equal")


def test_groups_that_share_their_batches_do_what_one_process_does():
    """Two groups of two processes, data on one side of the grid and context on the other, in shards and whole: likewise."""
    processes(4, "grid")


def test_a_checkpoint_is_read_by_another_number_of_processes(tmp_path):
    """Written by two processes, read and written by one, read by two: every parameter bit for bit, the size of every moment, the next loss and
    the loss after a step stay the same. Of shards that are damaged one line says so."""
    a, b, c = (json.loads(processes(n, "resize", tmp_path / source, tmp_path / target).stdout) for n, source, target in
               ((2, "none", "a"), (1, "a", "b"), (2, "b", "c")))
    assert a == pytest.approx(b, rel=1e-5) and a == pytest.approx(c, rel=1e-5) and len(a) == 3 * len(dict(scrambled(0).named_parameters())) + 2
    one, two, three = (weights.load(tmp_path / run / "checkpoint")[0].state_dict() for run in "abc")
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]) for name in one)
    assert (tmp_path / "a/checkpoint/shards").is_dir() and not (tmp_path / "b/checkpoint/shards").exists()
    shards, parameters = tmp_path / "a/checkpoint/shards", dict(scrambled(0).named_parameters())
    index, piece = shards / ".metadata", shards / "__1_0.distcp"
    assert len(parallel.load(shards, parameters)) == 3 * len(parameters)
    for path, content in ((piece, b""), (index, index.read_bytes()[:-900]), (index, b"nonsense" * 99), (index, b"")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="shards: not readable .*: nothing to resume"):
            parallel.load(shards, parameters)


def test_a_process_that_dies_stops_the_run_and_the_run_goes_on(whole, tmp_path):
    """Process 1 of two under torchrun, with the model in shards, ends in the third step after two of the ViT alone: process 0 says so in one line,
    nothing hangs, and the last checkpoint is gone on from by two processes, which come to the same numbers as a run that nobody
    died in, and by one, which comes to the end."""
    died = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d",
                           "--rdzv-endpoint", "localhost:0", "--local-addr", "localhost",  # else the machine's name, which may lead nowhere
                           "tests/processes.py", "train", "shards", "2", "5", *SHORT, tmp_path / "run"],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = [line for line in died.stderr.splitlines() if line.startswith("train.py")]
    assert died.returncode and len(said) == 1 and "another process has gone" in said[0] and "--resume" in said[0], died.stderr[-3000:]
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert (tmp_path / "run/checkpoint/shards").is_dir()
    processes(2, "train", "shards", 2, 0, *SHORT, tmp_path / "run", "--resume")
    processes(1, "train", "shards", 2, 0, *SHORT, tmp_path / "alone", "--resume")
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-6) and len(losses(whole)) == 6
    assert len(losses(tmp_path / "alone")) == 6


def test_a_signal_to_one_process_stops_all_of_them(whole, tmp_path):
    """SIGTERM to process 1 of two, with the model in shards: both finish the step, save and end with status 0, and the run that goes on
    is the one that nobody stopped; when it is over, one process evaluates the model that is saved."""
    stopped = processes(2, "train", "shards", 2, -5, *SHORT, tmp_path / "run")  # two steps of the ViT alone, three of the model
    assert "stopped after step 3" in stopped.stdout and losses(tmp_path / "run") == pytest.approx(losses(whole)[:5], rel=1e-6)
    processes(2, "train", "shards", 2, 0, *SHORT, tmp_path / "run", "--resume")
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-6)
    watched = [line for line in lines(tmp_path / "run") if "stills f1" in line]
    assert [line["step"] for line in watched] == [3]
    assert watched[0]["stills f1"] == pytest.approx(size(weights.load(tmp_path / "run/checkpoint")[0]), rel=1e-6)


def test_two_processes_train_as_one_does(tmp_path):
    """Two processes of a context group, with the model whole or in shards, log the losses and gradient norms of one process, step by
    step, from the scenes of the ViT alone on."""
    words = ("--steps", 3, "--out")
    processes(2, "train", "whole", 2, 0, *words, tmp_path / "group", "--context-parallel", 2)
    processes(2, "train", "shards", 2, 0, *words, tmp_path / "group in shards", "--context-parallel", 2)
    processes(1, "train", "whole", 2, 0, *words, tmp_path / "one")
    one, norms = losses(tmp_path / "one"), lambda run: lines(tmp_path / run)[2]["norms"]
    assert len(one) == 5
    for run in ("group", "group in shards"):
        assert losses(tmp_path / run) == pytest.approx(one, rel=1e-4), run
        assert norms(run) == pytest.approx(norms("one"), rel=1e-3)  # of the first step of the whole model


def test_loaders_are_shared_out_without_loss():
    """What three loaders have not yet taken comes exactly once among any number of loaders after them."""
    states = [{"next": [30], "pool": [3, 9]}, {"next": [13], "pool": []}, {"next": [26], "pool": [20, 23]}]
    left = {3, 9, 20, 23} | {n for n in range(100) if n >= states[n % 3]["next"][0]}
    for world in (1, 2, 3, 5):
        numbers = []
        for rank in range(world):
            state = loading.reshard_state(states, rank, world)
            numbers += [*state["pool"], *range(state["next"][0], 100, world)]
        assert sorted(numbers) == sorted(left)
    assert loading.reshard_state(states, 1, 3) == states[1]


def test_a_loader_with_more_waiting_than_fits_goes_on_exactly():
    """One loader after four gets more waiting numbers than its packer holds; stopped after any batch it goes on with the rest."""
    made = lambda state: loading.Loader(Counted(), Packer(8, 4, size=4), 1, "uniform", state=state)
    waiting = {"next": [40], "pool": list(range(0, 40, 3))}
    whole = [name for one in [made(waiting)] for _ in islice(one, 12) for name in one.names]
    assert len(set(whole)) == 12 and {*map(int, whole)} <= {*waiting["pool"], 40, 41}  # three more than were taken wait
    for stop in (1, 2, 5):
        first = made(waiting)
        names = [name for _ in islice(first, stop) for name in first.names]
        then = made(first.state)
        names += [name for _ in islice(then, 12 - stop) for name in then.names]
        assert names == whole


class Counted(torch.utils.data.Dataset):
    """Examples of six tokens, one a pack, that are called by their numbers."""

    def __getitem__(self, number):
        branch = Branch(np.arange(4), np.ones(4, bool), np.zeros((0, 3), int))
        return number, Example(np.arange(3), np.zeros((0, 1, 3), np.uint8), np.zeros((0, 4), int), [branch], str(number))


def test_many_processes_complain_once(tmp_path):
    """What is wrong for all of them alike is said by one, and nothing is written."""
    failed = processes(2, "train", "whole", 0, 0, "--context-parallel", 3, "--out", tmp_path / "run", fails=True)
    said = [line for line in failed.stderr.splitlines() if line.startswith("train.py")]
    assert said == ["train.py: --context-parallel 3: 2 processes cannot be cut into such groups"] and not (tmp_path / "run").exists()
