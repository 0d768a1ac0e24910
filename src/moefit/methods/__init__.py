"""One file for each method of the literature; importing this package registers them all."""

from moefit.methods import conmoe as conmoe
from moefit.methods import ean as ean
from moefit.methods import frequency as frequency
from moefit.methods import man as man
from moefit.methods import mone as mone
from moefit.methods import random as random
from moefit.methods import reap as reap
from moefit.methods.registry import METHODS, Method, find_method
from moefit.methods.run import make_plan

__all__ = ["METHODS", "Method", "find_method", "make_plan"]
