"""sources: readers of raw data sets, one module per value of `data.source`. ../data/README.md says how to add one."""
