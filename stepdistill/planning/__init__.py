"""A forecast of a run's memory and work from configurations alone."""
