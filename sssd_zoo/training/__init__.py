"""The one training loop, and what a run folder holds of it."""
