"""What executes the layers of baselines that are more than a plan for the runtime."""
