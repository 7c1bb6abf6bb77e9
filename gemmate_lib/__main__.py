"""`python -m gemmate_lib` is `gemmate`."""

from gemmate_lib.cli import run

run()
