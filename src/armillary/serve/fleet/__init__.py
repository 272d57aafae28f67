"""Several replicas of the engine behind one surface: routed, hedged, put on probation, restarted, and split into prefill and decode."""
