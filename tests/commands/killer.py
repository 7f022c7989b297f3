"""Runs a command and kills it, lets it wait, or takes a folder from it, at a chosen point.

How to: python killer.py POINT ACTION ARGUMENT ...

POINT is `MODULE:ATTRIBUTE:WHICH:WHEN`. WHICH is a number, of the call counted from 1, or a text that its arguments
contain; WHEN is `before` or `after` the call. ACTION is `kill`, `wait`, or the path of a folder to remove.
"""

import importlib
import os
import shutil
import signal
import sys
import time


def arm(point, action):
    path, attribute, which, when = point.split(":")
    owner = importlib.import_module(path)
    *outer, name = attribute.split(".")
    for part in outer:
        owner = getattr(owner, part)
    function = getattr(owner, name)
    calls = 0

    def act():
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action != "wait":
            return shutil.rmtree(action)
        sys.stdout.write("waiting\n")
        sys.stdout.flush()
        for _ in range(1000):
            time.sleep(0.1)  # in pieces: a signal that strikes just before a sleep is seen after it

    def called(*args, **options):
        nonlocal calls
        calls += 1
        hit = calls == int(which) if which.isdecimal() else which in str(args)
        if hit and when == "before":
            act()
        result = function(*args, **options)
        if hit and when == "after":
            act()
        return result

    setattr(owner, name, called)


if __name__ == "__main__":
    from nufilt_jax.cli import main

    arm(*sys.argv[1:3])
    sys.exit(main(sys.argv[3:]))
