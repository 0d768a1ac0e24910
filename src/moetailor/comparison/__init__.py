"""Every method at every ratio from one calibration: planned, applied in memory, measured, ranked."""
