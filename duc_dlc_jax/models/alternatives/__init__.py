"""What the paper compares DUC and DLC with, behind the interface of `models/registry.py`."""
