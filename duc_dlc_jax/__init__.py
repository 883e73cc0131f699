"""Semantic segmentation with ResNet, DUC (guided upsampling) and DLC (local context) in JAX."""

__version__ = "0.1.0"
