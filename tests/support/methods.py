"""What the tests must know of single methods."""

import moetailor
from moetailor.answers import Narrow

# What a method needs to save anything on tiny experts, or to leave them in the bits that they have.
TINY_PARAMETERS = {
    "lightmoe": {"rank": 1, "bases": 1},
    "compressed_experts": {"main": 1, "vectors": "layer"},
    "auto": {"bits": False},
    "camera": {"multiple": 1},
}
# Methods that take experts away, so that a number of experts to keep means something.
REMOVING = sorted(name for name, method in moetailor.METHODS.items() if method.removes)
# Those of them that take neurons away, and leave the experts.
NARROWING = [name for name, method in moetailor.METHODS.items() if method.replaces_with is Narrow]
# Families that a method refuses for what their router does.
REFUSED_BY = {"naee": {"phimoe"}, "refit": {"phimoe"}}
