"""The real execution of plans: dispatch, expert computation, combine, expert memory and the phase recorder."""
