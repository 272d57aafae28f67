"""What each endpoint accepts, field by field, with its bounds."""
