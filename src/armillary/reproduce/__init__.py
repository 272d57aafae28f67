"""Published systems: the headline experiment of each, ours beside the published figure."""
