"""The algebra that methods share: distances, clusters, averages, permutations of neurons, and fits of several shapes.

Functions of tensors, or of what is seen of one layer; which experts stay is no matter of theirs. Products run in the
inputs' dtype, sums and solutions in float64.
"""
