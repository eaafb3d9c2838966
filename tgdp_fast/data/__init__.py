"""Data to try the package on: Gaussian mixtures in closed form, and handwritten digits."""
