"""utils: errors, files, random numbers, processes, resuming and progress."""
