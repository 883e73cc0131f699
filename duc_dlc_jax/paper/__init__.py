"""`python -m duc_dlc_jax.paper`: the paper's tables beside what this project has of them.

tables   every figure of the paper that the page shows, and the paper's slips
"""
