"""The verbs of the command `armillary`: arguments in, tables out; each verb imports what it runs when it runs."""
