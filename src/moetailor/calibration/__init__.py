"""One pass of the original model over text: what each routed expert does, as sums that add and a sample that merges."""
