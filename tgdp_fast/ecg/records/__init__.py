"""Electrocardiogram records: folders, readers, leads, statements, splits, caches and output."""
