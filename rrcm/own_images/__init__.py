"""`rrcm train`: from a folder of one's own images to a certified classifier."""
