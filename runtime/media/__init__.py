"""Read images and camera frames, and draw kept tokens. Imports nothing else of the runtime."""
