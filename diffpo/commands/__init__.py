"""What a verb of the command line does beyond calling one room: check, collect, quickstart.

Imports every room but `cli`.
"""
