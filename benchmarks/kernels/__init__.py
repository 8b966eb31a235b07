"""Each primitive against its floor."""
