"""Everything inside or around the timer, on one rank."""
