"""Runs of the command line in processes that can be killed, without the seconds that a new one takes to import."""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

from moonshot.app import cli

SEED = int(os.environ.get("FAULTS_SEED", time.time_ns() % 10**6))


def generator(*about):
    """Random numbers of this run of the tests; FAULTS_SEED, which a failure prints, gives the same ones again."""
    print(f"FAULTS_SEED={SEED}")
    return random.Random(f"{SEED} {about}")


def _run(arguments, said):
    with open(said, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115 - the process's own
        sys.argv = ["moonshot", *map(str, arguments)]
        cli.main()


class Run:
    """One run of the command line. said: the file with its output."""

    def __init__(self, arguments, said):
        self.said = Path(said)
        self.process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments, said))
        self.process.start()

    def kill_after(self, seconds):
        """Kill -9 after so long; whether it was still there."""
        self.process.join(seconds)
        self.process.kill()
        return self.end() == -9

    def end(self):
        self.process.join()
        return self.process.exitcode


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())
