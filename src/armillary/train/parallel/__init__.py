"""How a model is laid out over ranks: one file a technique, one interface for the trainer (`apply`)."""
