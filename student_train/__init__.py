"""The trainer: sparse-target loss, mesh, data, optimiser, loop, checkpoints, evaluation, export.

Knows a store only through its reader and a model only through `gemma2`; never a teacher.
"""
