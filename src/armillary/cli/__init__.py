"""The verbs. Starts fast: nothing here imports torch before a verb needs it."""
