"""Drawing samples: one loop over a solver's table, in memory or into a file."""
