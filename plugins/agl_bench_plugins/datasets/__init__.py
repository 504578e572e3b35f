"""Datasets, one file each: files in, sections out."""
