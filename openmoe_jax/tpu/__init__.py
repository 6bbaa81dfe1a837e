"""What the training step becomes on a TPU slice, found out with the TPU compiler and without a TPU."""
