"""Random examples until the time is over; one that fails is shrunk to a small one, which hypothesis prints."""

import os
import time
from itertools import count

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.faults.runs import SEED

MINUTES = float(os.environ.get("FAULTS_MINUTES", 1))
_AT_ONCE = 50

settings.register_profile(
    "fuzz",
    derandomize=False,
    database=None,
    deadline=None,
    max_examples=_AT_ONCE,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def fuzz(examples, check):
    """Call `check` on examples of a strategy for FAULTS_MINUTES, with new ones each time; how many there were.

    FAULTS_SEED, which a failure prints, gives the same ones again.
    """
    print(f"FAULTS_SEED={SEED}")
    tried, end = 0, time.monotonic() + 60 * MINUTES
    for batch in count():
        if time.monotonic() > end:
            return tried

        @seed(SEED + batch)
        @settings(settings.get_profile("fuzz"))
        @given(examples)
        def checked(example):
            nonlocal tried
            tried += 1
            check(example)

        checked()
