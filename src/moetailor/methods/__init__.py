"""One file for each method of the literature; importing this registers them all, and those of other packages."""

from moetailor.methods import aimer as aimer
from moetailor.methods import auto as auto
from moetailor.methods import camera as camera
from moetailor.methods import compressed_experts as compressed_experts
from moetailor.methods import conmoe as conmoe
from moetailor.methods import diep as diep
from moetailor.methods import ean as ean
from moetailor.methods import easy_ep as easy_ep
from moetailor.methods import frequency as frequency
from moetailor.methods import hc_smoe as hc_smoe
from moetailor.methods import lightmoe as lightmoe
from moetailor.methods import linear as linear
from moetailor.methods import m_smoe as m_smoe
from moetailor.methods import man as man
from moetailor.methods import mergemoe as mergemoe
from moetailor.methods import mone as mone
from moetailor.methods import naee as naee
from moetailor.methods import quantize as quantize
from moetailor.methods import random as random
from moetailor.methods import ream as ream
from moetailor.methods import reap as reap
from moetailor.methods import refit as refit
from moetailor.methods import seer_moe as seer_moe
from moetailor.methods import sub_moe as sub_moe
from moetailor.methods.method import Method
from moetailor.methods.plugins import load_plugins
from moetailor.methods.registry import METHODS, find_method
from moetailor.methods.run import make_plan

__all__ = ["METHODS", "Method", "find_method", "make_plan"]

load_plugins()
