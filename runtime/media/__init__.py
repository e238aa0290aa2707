"""Images, camera frames, and pictures of kept tokens. Imports nothing else of the runtime."""
