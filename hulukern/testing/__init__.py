"""How an op is proven: one harness that reads specs, for this repository's tests and for new backends."""
