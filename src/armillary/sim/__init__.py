"""Virtual time: what an iteration would cost on hardware that is not here."""
