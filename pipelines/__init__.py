"""The verbs: ingest, train, sweep, sample, evaluate, register, promote."""
