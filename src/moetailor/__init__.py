"""moetailor makes Mixture-of-Experts language models fit: one calibration, any method, any budget.

Importing it also lets transformers load what it writes.
"""

from moetailor._version import __version__
from moetailor.answers import Width
from moetailor.calibration.batch import Batch
from moetailor.calibration.calibrate import calibrate
from moetailor.calibration.folder import Calibration
from moetailor.calibration.sampling import SampleOptions
from moetailor.calibration.text import TextOptions, read_batches
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.comparison.compare import compare
from moetailor.errors import CalibrationError, CheckpointError, MoetailorError, MoetailorWarning, PlanError
from moetailor.evaluation.evaluate import Scores, TaskOptions, evaluate
from moetailor.evaluation.search import Allocated, allocate
from moetailor.inspection.redundancy import Redundancy, find_redundancy
from moetailor.methods import METHODS, make_plan
from moetailor.methods.evolution import SearchOptions
from moetailor.pipeline import compress, precheck
from moetailor.planning.budget import Budget
from moetailor.planning.plan import Plan
from moetailor.recovery.examples import ExampleOptions
from moetailor.recovery.recover import RecoveryResult, recover
from moetailor.recovery.train import RecoveryOptions
from moetailor.runtime.quantizer import MoetailorConfig  # importing it registers the format with transformers
from moetailor.transform.apply import apply

__all__ = [
    "METHODS",
    "Allocated",
    "Batch",
    "Budget",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "ExampleOptions",
    "ExpertWeights",
    "MoetailorConfig",
    "MoetailorError",
    "MoetailorWarning",
    "Plan",
    "PlanError",
    "RecoveryOptions",
    "RecoveryResult",
    "Redundancy",
    "SampleOptions",
    "Scores",
    "SearchOptions",
    "TaskOptions",
    "TextOptions",
    "Width",
    "__version__",
    "allocate",
    "apply",
    "calibrate",
    "compare",
    "compress",
    "evaluate",
    "find_redundancy",
    "make_plan",
    "precheck",
    "read_batches",
    "recover",
]
