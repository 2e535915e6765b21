"""Expert weights: the store in host memory, the slots, the copies, and their schedule."""
