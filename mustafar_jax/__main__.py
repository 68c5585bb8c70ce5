"""The command as a module: python -m mustafar_jax."""

import sys

from mustafar_jax.cli import command

if __name__ == "__main__":
    sys.exit(command())
