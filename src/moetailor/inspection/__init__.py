"""How much of a model is redundant, from its calibration, before anything is removed."""
