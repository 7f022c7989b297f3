"""Merges ended by signals: the same command then gives the bits of an undisturbed one."""

import json
import random
import subprocess
import sys
from collections import Counter

from merge_fixtures import REPOSITORY

from benchmarks.faults import kills

N = 12


def test_merges_survive_signals(tmp_path):
    # In a process that has started no backend: it forks.
    command = [sys.executable, "-m", "benchmarks.faults.kills", tmp_path, N, 0]
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome["finding"] for outcome in outcomes if outcome["finding"]] == []
    assert Counter(outcome["kind"] for outcome in outcomes) == dict.fromkeys(kills.KINDS, N // len(kills.KINDS))
    assert {outcome["work"] for outcome in outcomes} == set(kills.WORKS)
    struck = {outcome["where"] for outcome in outcomes}
    assert struck <= {*kills.PHASES} and len(struck) > 2  # every one, and not all at the same work


class Fake(kills.Kills):
    """Whose runs are over before signals come, but for some."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def _sent(self, kind, work, rng):
        return kills.Outcome(kind, work, *(self.outcomes.pop(0) if self.outcomes else ("", "")))


def test_a_signal_that_strikes_no_run_is_sent_again():
    def sent(*outcomes):
        return Fake(*outcomes).kill("SIGINT", "add", random.Random(0))

    assert sent(("", ""), ("", ""), ("solving", "")) == ("SIGINT", "add", "solving", "", 2)
    assert sent(("", "other bits"), ("solving", "")) == ("SIGINT", "add", "", "other bits", 0)
    assert "none of 50 signals ended a run" in sent().finding


def test_what_a_run_is_at():
    page = bytearray(2)
    seen = []
    keep = kills._telling(lambda: seen.append(page[0]), page, kills.PHASES.index("writing the state"))
    kills._telling(lambda: keep() or seen.append(page[0]), page, kills.PHASES.index("reading"))()
    assert ([kills.PHASES[at] for at in seen], kills.PHASES[page[0]]) == (["writing the state", "reading"], "starting")
    kills._telling(lambda: None, page, kills.PHASES.index("publishing"))()
    assert kills.PHASES[page[0]] == "ending"
