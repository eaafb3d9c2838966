"""Measuring: speed side by side with what public code does, and errors against float64."""
