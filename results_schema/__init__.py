"""What a run's result files hold, as plain data that `experiments` writes by and `analysis` reads by."""
