"""What the papers were compared with, on the same core."""
