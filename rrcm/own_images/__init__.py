"""`rrcm train`: turn a folder of your own images into a certified classifier."""
