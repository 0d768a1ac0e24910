"""moefit makes Mixture-of-Experts language models fit: one calibration, any method, any budget.

Importing it also lets transformers load what it writes.
"""

from moefit._version import __version__
from moefit.calibration.batch import Batch
from moefit.calibration.calibrate import calibrate
from moefit.calibration.folder import Calibration
from moefit.calibration.run import SampleOptions
from moefit.calibration.text import TextOptions, read_batches
from moefit.checkpoint.weights import ExpertWeights
from moefit.comparison.compare import compare
from moefit.errors import CalibrationError, CheckpointError, MoefitError, MoefitWarning, PlanError
from moefit.evaluation.evaluate import Scores, TaskOptions, evaluate
from moefit.evaluation.search import Allocated, SearchOptions, allocate
from moefit.inspection.redundancy import Redundancy, find_redundancy
from moefit.methods import METHODS, make_plan
from moefit.pipeline import compress, precheck
from moefit.planning.budget import Budget
from moefit.planning.plan import Plan
from moefit.recovery.examples import ExampleOptions
from moefit.recovery.recover import RecoveryResult, recover
from moefit.recovery.train import RecoveryOptions
from moefit.runtime.quantizer import MoefitConfig  # importing it registers the format with transformers
from moefit.transform.apply import apply

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
    "MoefitConfig",
    "MoefitError",
    "MoefitWarning",
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
