"""What lies on disk: the tensors of a checkpoint, the anatomy of its MoE layers, one decoder layer at a time."""
