"""`python -m duc_dlc_jax.ablate`: variants of the network trained alike, side by side.

grid      which variants a configuration file names, and the order of their runs
runner    one run: training, evaluation, costs
claims    which process works on which run, where several share a workdir
results   a file per run, written when it ends; what is done and what is not
table     the runs of these files by variant
answers   the grid's questions: paired differences, verdicts
report    the page, with plots
"""
