"""A finished run or sweep as a Weights & Biases run: recorded on disk, and uploaded where that is asked for."""
