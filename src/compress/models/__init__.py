"""The decoder seen through its family: its parts, its residual branches, and the modules a compressed model runs on."""
