"""Files that nobody vouches for, and files that are kept for the user."""
