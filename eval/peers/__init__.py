"""The gallery against what a user would pick instead: `python -m eval peers`.

Both sides of a comparison do the same work on the same machine in one run, each in a process of its own (worker.py),
one repeat after the other in turns. Peers that are not on the machine get an environment under the runs folder, with
this environment's torch, so that both sides compute with the same build of it.
"""

from .comparison import PEERS, PeerSettings, is_whole, judged, measured, run, show, table, terminal

__all__ = ["PEERS", "PeerSettings", "is_whole", "judged", "measured", "run", "show", "table", "terminal"]
