"""Used by every room: errors, text, names, tables, files, locks, threads, random numbers by address, images.

Imports no other room.
"""
