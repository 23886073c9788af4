"""The files that measurements leave: one JSON object each, which says how and where it was made.

Every file has a ``kind``, the ``environment`` and the ``command``; the class of its kind says what
else it has. A file of another kind or version is refused with the field that is wrong.
"""

from mixquant.results.base import BASELINE, Arm, Environment
from mixquant.results.bench import Bench, Measurement, Piece
from mixquant.results.comparison import ComparedArm, Comparison
from mixquant.results.evaluation import Difference, Evaluation, Recovery, Score
from mixquant.results.fidelity import Cost, Divergence, Fidelity, Position
from mixquant.results.reading import Results, ResultsError, read, to_json
from mixquant.results.tuning import Predicted, Tried, Tuning

__all__ = [
    "BASELINE",
    "Arm",
    "Bench",
    "ComparedArm",
    "Comparison",
    "Cost",
    "Difference",
    "Divergence",
    "Environment",
    "Evaluation",
    "Fidelity",
    "Measurement",
    "Piece",
    "Position",
    "Predicted",
    "Recovery",
    "Results",
    "ResultsError",
    "Score",
    "Tried",
    "Tuning",
    "read",
    "to_json",
]
