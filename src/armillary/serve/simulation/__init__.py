"""The engine and fleets of it in virtual time: the same policies, memory and router; iterations that repeat are passed over at once."""
