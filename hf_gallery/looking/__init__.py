"""Looking at a model read: where each prediction came from, what each source is worth, how far back it reaches."""

from .reach import Reach as Reach
from .text import Look as Look
from .text import look as look
from .watch import Sources as Sources
