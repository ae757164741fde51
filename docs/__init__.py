"""Pages, and what writes and checks them; not part of the package."""
