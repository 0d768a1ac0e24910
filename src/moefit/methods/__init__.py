"""One file for each method of the literature; importing this package registers them all."""

from moefit.methods import auto as auto
from moefit.methods import compressed_experts as compressed_experts
from moefit.methods import conmoe as conmoe
from moefit.methods import diep as diep
from moefit.methods import ean as ean
from moefit.methods import easy_ep as easy_ep
from moefit.methods import frequency as frequency
from moefit.methods import hc_smoe as hc_smoe
from moefit.methods import lightmoe as lightmoe
from moefit.methods import linear as linear
from moefit.methods import m_smoe as m_smoe
from moefit.methods import man as man
from moefit.methods import mergemoe as mergemoe
from moefit.methods import mone as mone
from moefit.methods import naee as naee
from moefit.methods import random as random
from moefit.methods import ream as ream
from moefit.methods import reap as reap
from moefit.methods import refit as refit
from moefit.methods import seer_moe as seer_moe
from moefit.methods import sub_moe as sub_moe
from moefit.methods.registry import METHODS, Method, find_method
from moefit.methods.run import make_plan

__all__ = ["METHODS", "Method", "find_method", "make_plan"]
