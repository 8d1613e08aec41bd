"""What a compressed checkpoint has lost, won back by a little training. Optional: everything else here is one shot."""
