"""How weights are stored: grids, formats, rounding and bit packing."""
