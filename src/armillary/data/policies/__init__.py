"""How an input pipeline is tuned: pure functions of measured costs."""
