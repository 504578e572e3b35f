"""The grid: cells, their results, where they are kept and where they are shown."""
