"""Where trials run: in this process, or on Ray, here or on a cluster."""
