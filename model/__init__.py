"""The reference Hulu-Med, run from a checkout: reading medical files so far."""
