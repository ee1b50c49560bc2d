"""Programs in processes of their own without the seconds that their imports take: one process has imported everything once, and
what is started here is a copy of it."""

import faulthandler
import functools
import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

HERE = Path(__file__).resolve().parent
IMPORTED = ["processes", "infer", "torch._inductor"]  # the last, torch takes when it is told to be deterministic


@functools.cache
def context():
    """The process that is copied, from the first call on. It looks for modules where a program of the repository would, or a test."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), str(HERE), before)))
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before
    return found


def start(run: Callable, *words: object, out: Path, err: Path, environment: Mapping[str, str] = {}) -> BaseProcess:
    """run(*words) in the repository's root, as a process group of its own; what it prints goes to files."""
    process = context().Process(target=_begin, args=(run, [*map(str, words)], str(out), str(err), dict(environment)))
    process.start()
    return process


def _begin(run: Callable, words: list[str], out: str, err: str, environment: dict[str, str]):
    os.setsid()
    os.chdir(HERE.parent)
    os.environ |= environment
    for path, number in ((out, 1), (err, 2)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), number)
    faulthandler.enable()
    run(*words)
