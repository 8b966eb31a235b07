"""What the others write, and the pages and plots made of it."""
