"""Everything that only a GPU can show, in one command: `python -m scripts.gpu_check`."""
