"""Images in, WebDataset shards out, read in an order that is a pure function of (seed, dataset)."""
