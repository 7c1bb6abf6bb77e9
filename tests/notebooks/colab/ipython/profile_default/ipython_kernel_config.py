# Read by every kernel whose IPYTHONDIR is the folder above: its shell is Colab's.
c = get_config()  # noqa: F821
c.IPKernelApp.exec_lines = ["import google.colab"]
c.IPKernelApp.kernel_class = "google.colab._shell.Kernel"
