"""Tensors in, tensors out: losses, metrics, hypergradients, seeds. Imports torch only."""
