"""The paper's experiments and demonstrations, runnable from the command line."""
