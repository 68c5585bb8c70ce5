"""Processes on several hosts that together run one command."""

import argparse
import os
import sys

import jax

HEARTBEAT_SECONDS = 30
"""After so long without a sign of life from a process the others end."""


def add_hosts(command: argparse.ArgumentParser) -> None:
    """Where the processes meet, and which of them this is."""
    group = command.add_argument_group("several hosts")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where processes on several hosts meet: process 0's")
    group.add_argument("--num-processes", type=int, help="how many of them run this command, each with its own id")
    group.add_argument("--process-id", type=int, help="this one's, from 0 on; process 0 prints the text")


def join(options: argparse.Namespace) -> None:
    """Meet the other processes, before anything asks jax for devices; nothing to do where there are none.

    Raises ValueError for options that do not go together, or without --mesh, over which all processes' devices are.
    """
    given = {"--coordinator": options.coordinator, "--num-processes": options.num_processes}
    given |= {"--process-id": options.process_id}
    if all(value is None for value in given.values()):
        return
    if missing := [name for name, value in given.items() if value is None]:
        raise ValueError(f"{', '.join(missing)} must be given as well: --coordinator, --num-processes and --process-id")
    if options.num_processes < 1 or not 0 <= options.process_id < options.num_processes:
        raise ValueError(f"--process-id {options.process_id} must lie in 0 .. {options.num_processes - 1}")
    if options.mesh is None:
        raise ValueError("--mesh must say how the model is spread over the devices of all processes")
    jax.distributed.initialize(
        options.coordinator,
        options.num_processes,
        options.process_id,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    if options.process_id:  # the text is process 0's to print
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the end of the process
