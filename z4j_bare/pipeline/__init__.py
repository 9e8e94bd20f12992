"""The way of an event from the ring to the brain, and of the brain's frames to their handlers."""
