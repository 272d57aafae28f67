"""Answers that follow a grammar: JSON of a schema, a regular expression, one of several choices, or a grammar of one's own."""
