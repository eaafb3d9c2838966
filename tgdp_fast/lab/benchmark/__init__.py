"""Times of every case, side by side with what public code does: the command bench, and its reports."""
