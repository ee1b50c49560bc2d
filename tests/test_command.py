"""What all commands share: one line for bad input, files that are whole or not there."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

import command
from conftest import ROOT


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """What ends in the middle leaves the old file and no other; another name is where the new one grows."""
    path = tmp_path / "a.png"
    with command.atomic_write(path) as part:
        part.write_text("old")
        assert part.suffix == ".png" and not path.exists()
    with pytest.raises(KeyboardInterrupt), command.atomic_write(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=f"no such folder: '{tmp_path}/new'"), command.atomic_write(tmp_path / "new/a.png"):
        pass


def test_links_and_devices_stay_what_they_are(tmp_path):
    """What a link leads to is written and the link stays; a pipe (or /dev/null) is written to and not replaced by a file."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real/file")
    for text in ("one", "two"):
        with command.atomic_write(tmp_path / "link.json") as part:
            part.write_text(text)
            assert part.suffix == ".json"
        assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real/file").read_text() == text
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with command.atomic_write(tmp_path / "pipe") as part:
        part.write_text("three")
    assert os.read(end, 99) == b"three" and (tmp_path / "pipe").is_fifo()
    os.close(end)
    printed = subprocess.run([sys.executable, "-c", "import command\nprint('before', flush=True)\n"
                              "with command.atomic_write('/dev/stdout') as part, part.open('a') as file: file.write('this')\nprint(' after')"],
                             cwd=ROOT, stdout=open(tmp_path / "printed", "a"))
    assert printed.returncode == 0 and (tmp_path / "printed").read_text() == "before\nthis after\n"


def test_ctrl_c_ends_a_command_without_a_word(capsys):
    """As every other ending, it shows no traceback; the status is a shell's for it."""
    with pytest.raises(SystemExit) as end:
        with command.one_line("x"):
            raise KeyboardInterrupt
    assert end.value.code == 130 and capsys.readouterr() == ("", "")


def test_a_reader_that_goes_away_is_no_error():
    """A program whose output nobody reads any more, as after `| head`, ends without a word."""
    program = "import command\nwith command.one_line('x'):\n    while True:\n        print('line', flush=True)"
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait(60) == 141


def test_a_reader_that_was_never_there_is_no_error():
    """The same where all there is to say waits to be written until the end."""
    unread, write = os.pipe()
    os.close(unread)
    run = subprocess.run([sys.executable, "-c", "import command\nwith command.one_line('x'):\n    print('line')"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_said_in_one_line():
    """What was printed cannot be written: one line, status 2."""
    program = "import command\nwith command.one_line('x'):\n    print('line')"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(b"x: ") and done.stderr.count(b"\n") == 1


def test_a_closed_output_is_no_error():
    """With `>&-` there is nothing to print to: the command runs as it would."""
    program = "import command\nwith command.one_line('x'):\n    print('line')"
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, cwd=ROOT, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_end_a_command_leaves_no_temporary_files(tmp_path, number):
    """A signal ends the program with the status that a shell would show, and what it made for a while is gone; later signals end it as
    before. One that is ignored, as under `nohup`, still is."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as end, command.told_to_end(), tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), number)
        assert end.value.code == 128 + number and not list(tmp_path.iterdir()) and signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with command.told_to_end():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_what_a_terminal_cannot_show_is_replaced():
    """A character that the encoding of the output has not, and half of one, become question marks."""
    program = "import command\nwith command.one_line('x'):\n    print('caf\\u00e9 \\ud83d')"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (run.returncode, run.stdout) == (0, b"caf? ?\n")


def test_a_device_is_refused_by_all_processes_alike(monkeypatch):
    """Two processes for one GPU end in the same line in both, one that this machine lacks too."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(argparse.ArgumentTypeError, match="2 processes and 1 GPU: start as many, or try cpu"):
            command.device("cuda")
        with pytest.raises(argparse.ArgumentTypeError, match="not available on this machine"):
            command.device("nowhere")
    assert command.device("cpu") == "cpu"


def test_the_usual_device_is_one_that_works(monkeypatch):
    """A GPU that is there but for which torch has no kernels is not taken; of many processes each tries its own later."""
    def no_kernels(*_, **__):
        raise RuntimeError("no kernel image is available for execution on the device")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert command.device("usual") in ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", no_kernels)
    assert command.usual_device() == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert command.usual_device() == "cuda"
