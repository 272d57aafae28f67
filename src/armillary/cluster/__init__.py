"""What computation runs on: for now, this machine, measured."""
