"""Real models and data, fetched when they are used; no row of data lies in this repository."""
