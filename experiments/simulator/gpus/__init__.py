"""Today's GPUs: what was measured or published on H200s, and the simulator held against it."""
