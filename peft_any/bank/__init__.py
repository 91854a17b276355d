"""Many adapters over one base: mixed batches, banks, adapters of equal shapes, and a store."""
