"""Measuring codecs: what they cost in bits, in quality and in time, on your model and your texts.

from ghostcacher.research import evaluate
print(evaluate(model, "int4", texts))  # texts: token ids, one tensor [1, tokens] each
"""

from ghostcacher.research.calibrate import COMPARED, calibrate, steps_of
from ghostcacher.research.evaluate import PREFIX_TOKENS, SCORED_TOKENS, Measure, evaluate
from ghostcacher.research.ladder import LADDER, sweep
from ghostcacher.research.turns import Turns, turns

__all__ = [
    "COMPARED",
    "LADDER",
    "PREFIX_TOKENS",
    "SCORED_TOKENS",
    "Measure",
    "Turns",
    "calibrate",
    "evaluate",
    "steps_of",
    "sweep",
    "turns",
]
