"""What a run will hold in memory, counted before anything is loaded (`--plan`).

live.py        counts the bytes of live tensors
blueprint.py   the model of a run, of tensors without memory
gpu.py         lets such a model run, on a machine without a GPU, as it would on one
update.py      the bytes of an update of the weights
rollout.py     the bytes of an engine
plan.py        both of them for each phase of a run, and whether they fit
advice.py      the settings with which a run fits
command.py     what --plan prints
"""
