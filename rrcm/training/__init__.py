"""training: pre-training, fine-tuning and the loop they share."""
