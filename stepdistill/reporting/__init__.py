"""The report of one training run, drawn from its records alone; needs no plotting library."""
