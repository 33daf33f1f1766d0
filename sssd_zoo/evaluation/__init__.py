"""What a trained network is worth: features, probes, neighbours, early exit, and the reports of them."""
