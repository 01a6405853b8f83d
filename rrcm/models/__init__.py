"""models: the vision transformer, the classifiers that are smoothed, and their checkpoints."""
