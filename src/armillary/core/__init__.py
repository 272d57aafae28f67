"""The four words (work, policy, executor, trace) and what every ring needs: clock, units, errors, config, native build."""
