"""Images in: sources, decoding, batches, augmentation, and the shipped sample."""
