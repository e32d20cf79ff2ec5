"""What every room uses: errors, text, names, tables, files, locks, threads, random numbers by address, images.

Imports no other room.
"""
