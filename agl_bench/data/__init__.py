"""From AnnData on the host to tensors on the device: checks, filters, folds, genes, store."""
