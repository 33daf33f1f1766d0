"""Data: sources, decoding, batches, augmentation, and the bundled sample."""
