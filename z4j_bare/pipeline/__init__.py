"""Short functions that pump the rooms below: one loop over the narrow seam, never a second copy for another runtime."""
