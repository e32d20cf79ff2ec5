"""Used by every room: errors, text, files, locks, threads, random numbers by address, decoding of images.

Imports no other room.
"""
