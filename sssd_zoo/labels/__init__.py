"""Where labels come from: clusters, chance, the truth, or the network itself."""
