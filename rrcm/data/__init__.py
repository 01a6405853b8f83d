"""data: data sets, shards, augmentation and the loader."""
