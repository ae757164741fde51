"""A run: built, fed, resumed, trained step by step, evaluated."""
