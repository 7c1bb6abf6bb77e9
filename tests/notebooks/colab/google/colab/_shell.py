"""Colab's shell: by its name a program knows that it runs in Colab."""

from ipykernel.ipkernel import IPythonKernel
from ipykernel.zmqshell import ZMQInteractiveShell


class Shell(ZMQInteractiveShell):
    """The shell of every notebook that Colab opens."""


class Kernel(IPythonKernel):
    """A kernel with that shell."""

    shell_class = Shell
