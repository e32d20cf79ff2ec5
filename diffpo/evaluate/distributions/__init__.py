"""Distances between two sets of pictures, by their features."""
