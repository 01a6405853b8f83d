"""sources: the data sets by the setting `data.source`, one module each. ../data/README.md says how to add one."""
