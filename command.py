"""What all commands share: bad input ends in a one-line error, a file is written completely or not at all, a folder by one at a time."""

import argparse
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HOME = Path(__file__).resolve().parent  # assets are found from any folder


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # argparse itself would print its usage as well


def number(kind: type, low: float, high: float):
    """An argparse type: a number from `low` to `high`."""
    def read(text: str):
        try:
            if low <= (value := kind(text)) <= high:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number "
                                         f"from {low:,} to {high:,}")
    return read


def device(name: str) -> str:
    """An argparse type: a device that this machine has, and for every process that torchrun started here. "usual", the default
    of all commands: a GPU if there is one."""
    import torch  # takes a second
    name = usual_device() if name == "usual" else name
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "cuda" and 0 < (gpus := torch.cuda.device_count()) < processes:  # by all processes alike
        raise argparse.ArgumentTypeError(f"cuda: {processes} processes and {gpus} GPU{'s' * (gpus > 1)}: start as many, or try cpu")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name  # under torchrun each process has its own GPU
    try:
        torch.zeros(1, device=own).item()
    except (RuntimeError, AssertionError, ImportError):
        raise argparse.ArgumentTypeError(f"{name}: not available on this machine: try cpu") from None
    return name


def usual_device() -> str:
    """"cuda" if there is a GPU for which this torch has kernels (builds for CUDA 13 have none for old ones), else "cpu"."""
    import torch
    if "LOCAL_RANK" in os.environ:  # `device` will try the own one of each process
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return "cuda" if torch.cuda.is_available() and torch.zeros(1, device="cuda").item() == 0 else "cpu"
    except RuntimeError:
        return "cpu"


@contextmanager
def one_line(program: str):
    """Around a command: bad input ends in one line on stderr and exit status 2, warnings are one line each.
    MOLMO_TRACEBACK=1 in the environment shows the traceback."""
    def say(*words: object) -> None:
        print(f"{program}:", *" ".join(map(str, words)).split(), file=sys.stderr)

    def forget() -> None:
        """What was printed and cannot be written goes nowhere; else Python would try again at its end, and complain."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)  # "default": once, however often the file is decoded
        warnings.showwarning = lambda message, *_, **__: say("warning:", message)
        try:
            if hasattr(sys.stdout, "reconfigure"):  # not so in a notebook
                sys.stdout.reconfigure(errors="replace")  # an answer may hold characters that the terminal has not
            yield
            if sys.stdout:  # None if it was closed, as by `>&-`
                sys.stdout.flush()
        except BrokenPipeError:  # nobody reads on, as after `| head`
            forget()
            raise SystemExit(141) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except Exception as error:
            expected = isinstance(error, (OSError, ValueError, RuntimeError, MemoryError)) or type(error).__name__ == "FailOnRecompileLimitHit"  # torch's
            if not expected or os.environ.get("MOLMO_TRACEBACK") == "1":
                raise
            text = str(error) or type(error).__name__
            if isinstance(error, OSError) and error.filename is not None and error.strerror:  # else "[Errno 17] File exists: 'x'"
                path = error.filename2 or error.filename  # of a renaming the new name
                text = f"{path}: {'a file: give a folder' if isinstance(error, FileExistsError) and os.path.isfile(path) else error.strerror}"
            say(text)
            try:
                print(end="", flush=True)
            except OSError:
                forget()
            raise SystemExit(2) from None


@contextmanager
def told_to_end() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end the program as an error does: temporary files go. (Not those that somebody handles or, as `nohup`,
    ignores; and only the main thread hears signals.)"""
    def end(number: int, frame) -> None:
        raise SystemExit(128 + number)

    both = {getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)}  # Windows has one
    fatal = {number for number in both if signal.getsignal(number) == signal.SIG_DFL and threading.current_thread() is threading.main_thread()}
    for number in fatal:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in fatal:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Around the writing of a file: yields another name to write to; the file has its own once it is complete, or not at all.
    A link stays and what it leads to is written; pipes, and all that is in /dev, are written to as they are."""
    path = Path(path)
    if path.exists() and (path.is_relative_to("/dev") or not path.is_file()):  # (/dev/stdout may lead to a file)
        yield path
        return
    name, path = path.name, path.resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    part = path.with_name(f".{os.getpid()}.{name}")  # the suffix may choose the format
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path, looking: bool = False) -> Iterator[None]:
    """Inside, no other process of this machine gets here with the same folder; several that are only `looking` do not mind each other.
    ValueError if another is in. However a process ends, it lets go."""
    if fcntl is None:
        yield
        return
    with open(folder / ".writing", "a+") as file:
        try:  # unlike those of `flock`, these locks are not inherited by workers, which may live a little longer
            fcntl.lockf(file, (fcntl.LOCK_SH if looking else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing in {folder}: wait for its end, or give another folder") from None
        except OSError:  # a file system without locks
            pass
        yield
