"""What running a server takes beside answering: who may ask how much, what is refused under load, and what is told about it."""
