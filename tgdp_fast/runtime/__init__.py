"""What everything stands on: argument checks, arrays, files, checkpoints, native extension, progress."""
