"""fairseq's commands for tests that start whole scripts: the same programs, forked from a process that has imported fairseq.

Begun from nothing each would import for six seconds. `commands` makes a folder for PATH with fairseq-train and the others;
what lies there is a client of a few lines, which hands its arguments, environment, folder and streams over to the tests'
process, passes signals on, and ends as the command ends, by the same status or signal. Killed, it takes the command with it.
tests/test_readme.py and tests/test_ending.py start the installed commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from multiprocessing.connection import wait
from pathlib import Path
from typing import Dict, Iterator, List

from fairseq_runs import become, fork_server

NAMES = ("fairseq-train", "fairseq-generate", "fairseq-validate", "fairseq-preprocess", "fairseq-hydra-train")
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
told = json.dumps([[{name!r}, *sys.argv[1:]], dict(os.environ), os.getcwd()]).encode()
for number in {signals!r}:
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
socket.send_fds(server, [len(told).to_bytes(8, "little")], [0, 1, 2])
server.sendall(told)
status = int.from_bytes(server.recv(2), "little", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
SIGNALS = [int(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)]


@contextlib.contextmanager
def commands() -> Iterator[Path]:
    """A folder with fairseq's commands, which work as long as this lasts."""
    fork_server()  # by this thread, not by those that serve
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        address = f"{folder}/socket"
        listening.bind(address)
        listening.listen(64)
        (Path(folder) / "bin").mkdir()
        for name in NAMES:
            program = Path(folder) / "bin" / name
            program.write_text(CLIENT.format(python=sys.executable, address=address, name=name, signals=SIGNALS))
            program.chmod(0o755)
        threading.Thread(target=_accept, args=(listening,), daemon=True).start()
        yield program.parent
        listening.shutdown(socket.SHUT_RDWR)


def _accept(listening: socket.socket) -> None:
    while True:
        try:
            client, _ = listening.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(client,), daemon=True).start()


def _serve(client: socket.socket) -> None:
    """One command of one client, to its end."""
    with client:
        size, streams, _, _ = socket.recv_fds(client, 8, 3)
        told = b""
        while size and len(told) < int.from_bytes(size, "little"):
            more = client.recv(65536)
            if not more:
                break
            told += more
        try:
            if not size or len(told) < int.from_bytes(size, "little"):
                return  # killed before it had said what it wants
            with _lock:
                process = fork_server().Process(target=_command, args=(*json.loads(told), [_Stream(fd) for fd in streams]))
                process.start()
        finally:
            for stream in streams:
                os.close(stream)
        while wait([process.sentinel, client]) != [process.sentinel]:
            number = client.recv(1)  # of a signal; nothing: the client was killed
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number[0] if number else signal.SIGKILL)
            if not number:
                break
        process.join()
        with contextlib.suppress(OSError):
            client.sendall(process.exitcode.to_bytes(2, "little", signed=True))


_lock = threading.Lock()  # multiprocessing starts one process at a time


class _Stream:
    """A descriptor that arrives in the new process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self):
        from multiprocessing.reduction import DupFd

        return _detached, (DupFd(self.descriptor),)


def _detached(duplicate) -> int:
    return duplicate.detach()


def _command(words: List[str], environment: Dict[str, str], cwd: str, streams: List[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    become(words, environment, cwd)
