"""Measuring and reproducing: the commands validate, bench, bench-report, demo and experiment."""
