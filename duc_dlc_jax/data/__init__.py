"""Data sets: label contracts, preparation, augmentation and the input pipeline."""
