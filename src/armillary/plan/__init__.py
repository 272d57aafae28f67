"""What to run on what: the rate that a configuration sustains under an objective, the cheapest one, and the file that `serve` executes."""
