"""Flower's process for a message is forked from a loaded one, and is like a new one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dare_agg.flower import supernode
from dare_agg.flower.processes import launcher, start_clientapp

# A launcher whose program says who it is and what it was given.
TOLD = """
import os, random, sys
from dare_agg.flower.processes import launcher
class Script:
    def load(self):
        return program
def program():
    import numpy
    print(sys.argv[0], *sys.argv[1:], os.getpid(), os.getppid(), random.random(),
          numpy.random.random(), "dare_agg.flower" in sys.modules)
    if sys.argv[1] == "fails":
        raise ValueError("no such luck")
    sys.exit(int(sys.argv[2]))
launcher.distribution = lambda name: type("D", (), {"entry_points": type(
    "E", (), {"select": lambda self, **words: [Script()]})()})
launcher.main()
"""


@pytest.fixture
def told(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen]]:
    path = tmp_path / "node" / "l.sock"
    path.parent.mkdir()
    words = [str(path), "--remove", str(path.parent)]
    process = subprocess.Popen([sys.executable, "-c", TOLD, *words], stdin=subprocess.PIPE)
    until = time.monotonic() + 120
    while not listens(path):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    yield path, process
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.wait(30)


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        return connection.connect_ex(str(path)) == 0


def ask(path: Path, *arguments: str) -> list[str]:
    """What a program started there prints, to a stream of our own."""
    read, write = os.pipe()
    script = [sys.executable, "-I", "-S", start_clientapp.__file__, str(path), "/bin/false"]
    done = subprocess.run([*script, *arguments], stdout=write, check=False, timeout=120)
    os.close(write)
    assert done.returncode == 0
    with os.fdopen(read) as stream:  # to its end: the forked process has ended
        return stream.read().split()


def test_each_message_is_a_process_of_its_own_with_its_own_draws(told) -> None:
    path, process = told
    first, second = ask(path, "a b", "0"), ask(path, "a b", "0")
    assert first[:3] == ["flwr-clientapp", "a", "b"] and len(first) == 9
    pids = [int(said[4]) for said in (first, second)]
    assert len({*pids, process.pid}) == 3
    assert int(first[5]) == int(second[5]) == process.pid
    # Forked processes share no random state, and nothing that an app may bring itself.
    assert first[6] != second[6] and first[7] != second[7]
    assert first[8] == second[8]


def test_a_program_that_raises_leaves_the_launcher_alone(told) -> None:
    path, process = told
    assert ask(path, "fails", "0")[1] == "fails"
    assert ask(path, "works", "3")[1] == "works" and process.poll() is None


def test_it_ends_with_its_supernode(told) -> None:
    path, process = told
    assert ask(path, "works", "0")[1] == "works" and path.exists()
    process.stdin.close()
    assert process.wait(30) == 0
    # Also where that was killed and left its folder behind.
    assert not path.parent.exists()


def test_a_request_of_another_form_starts_nothing(told) -> None:
    path, process = told
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        connection.sendall(b"--token\0x\0")  # no streams
        assert connection.recv(1) == b""
    assert ask(path, "works", "0")[1] == "works" and process.poll() is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user for a moment")
def test_another_user_starts_nothing(told) -> None:
    """Also where folder and socket were opened to all."""
    path, process = told
    short = Path(tempfile.mkdtemp())  # pytest's own folders are closed further up
    short.chmod(0o711)
    there = short / "l.sock"
    there.hardlink_to(path)
    there.chmod(0o777)
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        status = 1
        with contextlib.suppress(OSError):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(30)
            connection.connect(str(there))
            status = 2
            try:
                socket.send_fds(connection, [b"works\0" + b"0\0"], [0, 1, 2])
                status = 0 if connection.recv(1) == b"" else 3
            except (ConnectionResetError, BrokenPipeError):
                status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ask(path, "works", "0")[1] == "works" and process.poll() is None
    shutil.rmtree(short)


def test_without_a_launcher_flowers_own_program_runs(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text('#!/bin/sh\necho own "$@"\n')
    own.chmod(0o700)
    path = tmp_path / "gone.sock"
    script = [sys.executable, "-I", "-S", start_clientapp.__file__, str(path), str(own), "--token"]
    done = subprocess.run([*script, "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == "own --token a b\n"


def test_the_command_on_the_path_is_flowers_program() -> None:
    """The whole way: what SuperExec finds as flwr-clientapp is Flower's, with its words."""
    before = os.environ["PATH"]
    with supernode._launched():
        command = shutil.which(launcher.PROGRAM)
        assert command is not None and "dare-agg-node-" in command
        assert Path(command).stat().st_mode & 0o077 == 0
        said = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
        assert said.stdout.startswith(f"usage: {launcher.PROGRAM}")
    assert os.environ["PATH"] == before and not Path(command).exists()


def test_a_message_is_handled_when_all_of_it_is_there(told) -> None:
    path, _ = told
    receiving = supernode.Receiving(path.with_name(launcher.RECEIVING))
    began = time.monotonic()
    with receiving:
        release = threading.Timer(1.0, receiving.__exit__)
        release.start()
        ask(path, "works", "0")
    assert time.monotonic() - began >= 1.0
    # A message that is long under way is waited for by Flower's own client.
    began = time.monotonic()
    with receiving:
        launcher.wait_for_message(path.with_name(launcher.RECEIVING), 0.2)
    assert 0.2 <= time.monotonic() - began < launcher.RECEIVING_SECONDS


def test_a_killed_launcher_costs_nothing_but_time(told, tmp_path: Path) -> None:
    path, process = told
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()  # and nobody listens
    assert not start_clientapp.ask(str(path), ["x"])
