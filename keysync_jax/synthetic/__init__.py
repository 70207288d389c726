"""A small world of talking heads in which speech determines the mouth, and everything about it is known."""
