"""What stands first on a SuperNode's PATH as ``flwr-clientapp``: asks the `launcher` for one.

``python -I -S start_clientapp.py SOCKET PROGRAM [arguments]``: starts in a few hundredths of a
second, since it loads nothing. Where the launcher does not answer it becomes ``PROGRAM``, Flower's
own.
"""

from __future__ import annotations

import os
import socket
import sys

# The launcher may have just begun to load.
PATIENCE_SECONDS = 60.0


def ask(path: str, arguments: list[str]) -> bool:
    """Whether the launcher started the program with these arguments and our streams."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE_SECONDS)
            connection.connect(path)
            request = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
            socket.send_fds(connection, [request], [0, 1, 2])
            return connection.recv(1) == b"1"
    except OSError:
        return False


def main() -> None:
    """Ask, or become the program."""
    path, program, *arguments = sys.argv[1:]
    if not ask(path, arguments):
        os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
