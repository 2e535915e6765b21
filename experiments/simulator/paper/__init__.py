"""The paper's machine: its published figures, and the simulator held against them."""
