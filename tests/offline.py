"""Run a command in a namespace whose only network is its own loopback.

    python tests/offline.py COMMAND [ARGUMENT ...]

Jupyter kernels talk over the loopback, so it is brought up; nothing else is there. Where the
system forbids namespaces the command runs all the same, and a line says that nothing was proven.
"""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def possible() -> bool:
    """Whether this system allows a namespace without a network."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0


def loopback_up() -> None:
    """Bring up `lo` in the namespace this process is in."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh", b"lo", 0)
        flags = struct.unpack("16sh", fcntl.ioctl(sock, SIOCGIFFLAGS, request)[:18])[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | IFF_UP))


def main(command: list[str]) -> None:
    """Replace this process by the command, inside a namespace if there can be one."""
    if command[0] == "--inside":
        loopback_up()
        os.execvp(command[1], command[1:])
    if possible():
        os.execvp("unshare", ["unshare", "-rn", sys.executable, __file__, "--inside", *command])
    print("no network namespace here: running with the network as it is", file=sys.stderr)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
