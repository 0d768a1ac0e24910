"""What may stand behind one output of a router, a slot: one file for each kind, registered by being imported here."""

from moetailor.answers.answer import ANSWERS, Answer, Call, Context, all_marks
from moetailor.answers.width import FLOATS, VQ_BITS, WHOLE, Kind, Width

from moetailor.answers.keep import Keep  # isort: skip (the order of the kinds in files and legends)
from moetailor.answers.fitted import Fitted  # isort: skip
from moetailor.answers.packed import Packed  # isort: skip
from moetailor.answers.narrow import Narrow  # isort: skip
from moetailor.answers.drop import Drop  # isort: skip
from moetailor.answers.constant import Constant  # isort: skip
from moetailor.answers.linear import Linear  # isort: skip
from moetailor.answers.low_rank import LowRank  # isort: skip
from moetailor.answers.merged import Merged  # isort: skip
from moetailor.answers.remap import Remap  # isort: skip
from moetailor.answers.borrowed import Borrowed  # isort: skip
from moetailor.answers.auxiliary import Auxiliary  # isort: skip
from moetailor.answers.slot_map import SlotMap  # isort: skip

__all__ = [
    "ANSWERS",
    "FLOATS",
    "VQ_BITS",
    "WHOLE",
    "Answer",
    "Auxiliary",
    "Borrowed",
    "Call",
    "Constant",
    "Context",
    "Drop",
    "Fitted",
    "Keep",
    "Kind",
    "Linear",
    "LowRank",
    "Merged",
    "Narrow",
    "Packed",
    "Remap",
    "SlotMap",
    "Width",
    "all_marks",
]
