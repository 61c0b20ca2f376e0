"""What training would take, before a machine is asked for it: memory, traffic and time per rank.

All by formula from the configuration; no model is run. Tests compare with small models that are.
"""
