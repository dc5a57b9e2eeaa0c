"""What a run will hold in memory, counted before anything is loaded (`--plan`).

live.py        counts the bytes of live tensors
blueprint.py   the model of a run, of tensors without memory
gpu.py         lets such a model run, on a machine without a GPU, as it would on one
passes.py      a forward and a backward pass, and the most that each part of them holds
first_layers.py  all layers of a model from runs of its first ones
update.py      the bytes of an update of the weights
rollout.py     the bytes of an engine
sharding.py    the bytes of an update on one of several ranks
target.py      where a run is to be
phases.py      which phases a run has
plan.py        what each of them holds, and whether it fits
planner.py     finds that
choice.py      what a run on a GPU chooses by it
advice.py      the settings with which a run fits
command.py     what --plan prints
"""
