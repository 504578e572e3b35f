"""Auxiliary selectors, one file each: its source, then how it differs from the source."""
