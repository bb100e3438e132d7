"""Read models into plain data and build them again; the only code that names classes of host libraries.

The registry of the model families is `slimming.models.families`.
"""
