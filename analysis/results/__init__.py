"""Living with results: what there is, what differs between two of them, and a folder of them that can be sent away."""
