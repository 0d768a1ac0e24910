"""The plan carried out: on a model in memory, or on a checkpoint streamed from disk to disk."""
