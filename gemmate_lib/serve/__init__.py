"""Several adapters behind one API: the base is in memory once, each run an adapter on it."""
