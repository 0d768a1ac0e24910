"""The algebra that methods share: clusters, permutations of neurons, and least squares in two shapes.

Pure functions of tensors, with no idea of a model. Products run in the inputs' dtype, sums and solutions in float64.
"""
