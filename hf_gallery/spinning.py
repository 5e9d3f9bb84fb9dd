"""Spinning of idle OpenMP threads, before they sleep, in the commands of the gallery.

torch's threads meet at the end of every small operation, and libgomp lets whoever is early spin for milliseconds. On
idle cores that is fast; beside another busy process the spinning takes the cores that the late ones need, and a step
that takes a second takes a minute. After 10,000 turns (tens of microseconds) instead it is as fast on idle cores.

libgomp reads this once, when torch is imported. So it is set before that, and by commands only: a library leaves the
environment to the program that imports it (docs/GUIDE.md says how to set it there).
"""

import os
import sys


def spin_briefly() -> None:
    """Sets GOMP_SPINCOUNT for this process and those that it starts, unless the user has set it or OMP_WAIT_POLICY."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def is_command() -> bool:
    """Tells whether this process was started as `hf-gallery` or `python -m hf_gallery`."""
    started = list(zip(sys.orig_argv, sys.orig_argv[1:], strict=False))
    script = os.path.splitext(os.path.basename(sys.argv[0]))[0] if sys.argv else ""
    return script == "hf-gallery" or ("-m", "hf_gallery") in started
