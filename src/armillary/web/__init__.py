"""The page served at `/` and the HTML report of a run."""
