"""Backbones, one file each: spots in, features out."""
