"""One training process: the pair, optimiser, loop, evaluation, checkpoints. Knows torch.distributed, not Ray."""
