"""What compression cost: against the original, with intervals; on tasks; in bytes and in time."""
