"""Trained networks as bundles that run without this package; `python -m duc_dlc_jax.export`."""
