"""Sources to betons to batches: preparation, order, augmentation and the two loaders."""
