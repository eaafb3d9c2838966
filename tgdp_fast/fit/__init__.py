"""Fitting: the training loop, the density ratio and its diagnostics, the guidance network, the baselines."""
