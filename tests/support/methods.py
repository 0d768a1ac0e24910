"""What the tests must know of single methods."""

# What a method needs to save anything on tiny experts.
TINY_PARAMETERS = {"lightmoe": {"rank": 1, "bases": 1}, "compressed_experts": {"main": 1, "vectors": "layer"}}
# Families that a method refuses for what their router does.
REFUSED_BY = {"naee": {"phimoe"}, "refit": {"phimoe"}}
